"""From published files to prepared folders: downloads, archives, records and squares."""
