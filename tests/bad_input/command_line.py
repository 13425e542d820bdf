"""Mistakes in the command line, the config and its values, and the machine."""

from tests.bad_input.case import NEW_ALBUM, TRAIN, Bad, changed, file
from tests.bad_input.spoil import full_disk, little_memory, no_device, no_home, no_network
from tests.command_line import QUICKSTART

CASES = {
    # The command line.
    "no config": Bad(["--workdir=x"], "--config is missing; for example --config=quickstart"),
    "two configs": Bad(
        [QUICKSTART, "--config=mine.py"],
        "--config is given 2 times .--config=configs/quickstart.py --config=mine.py.; name one",
    ),
    "no such file": Bad(
        ["--config=configs/imagnet.py"],
        "imagnet.py is no file .*did you mean 'imagenet100'..; choose from cifar10, .*or name a",
    ),
    "stray argument": Bad([QUICKSTART, "train"], "unexpected argument 'train'"),
    "half of what several processes need": Bad(
        [QUICKSTART, "--processes=2", "--process=0"],
        "--coordinator, --processes and --process belong together",
    ),
    "no such port": Bad(
        [QUICKSTART, "--coordinator=localhost:99999", "--processes=2", "--process=0"],
        "--coordinator=localhost:99999 must be HOST:PORT, a port from 1 to 65535",
    ),
    "unknown flag": Bad([QUICKSTART, "--workdri=x"], "Unknown command line flag 'workdri'"),
    "unknown mode": Bad(
        [QUICKSTART, "--mode=tset"],
        "--mode=tset: .*prepare.train.evaluate.predict.export.serve.sweep.labels.compare.ensemble",
    ),
    "unknown field": Bad(
        [QUICKSTART, "--config.train.epocs=3"],
        "config.train.epocs is no field .did you mean 'train.epochs'..; choose from train.epochs",
    ),
    "field of a value": Bad([QUICKSTART, "--config.method.x=3"], "config.method.x is no field"),
    "value for a section": Bad([QUICKSTART, "--config.train=3"], "config.train=3"),
    "no number": Bad([QUICKSTART, "--config.train.epochs=many"], "config.train.epochs=many"),
    "unknown method": Bad(
        [QUICKSTART, "--config.method=snyc"],
        "config.method='snyc' .*did you mean 'sync'.*choose from aurc, ccl_sc, ce, deep_gamblers, ",
    ),
    "unknown dataset": Bad(
        [QUICKSTART, "--config.data.name=mnist"],
        "config.data.name='mnist' is unknown.*choose from cifar10, .*fashion_mnist, ",
    ),
    "no data": Bad(
        ["--config=configs/imagenet100.py", "--config.data.data_dir=new"],
        "imagenet100 is not prepared: .*ILSVRC2012_img_train.tar.*image-net.org.*--mode=prepare",
    ),
    "crops beyond the square": Bad(
        [QUICKSTART, "--config.data.stored_size=32"],
        "image_size=64, stored_size=32 and short_side=32 must not decrease",
    ),
    "not finite": Bad([QUICKSTART, "--config.loss.alpha=nan"], r"alpha=nan must be .* in \[0, 1\]"),
    "no steps to trace": Bad(
        [QUICKSTART, "--config.profile.steps=ten"], "profile.steps='ten' must be steps of the run"
    ),
    "a trace beyond the end": Bad(
        [*TRAIN, "--workdir=new", "--config.profile.steps=35-37"],
        "profile.steps='35-37' is beyond the run's 18 steps",
    ),
    "coverage 0": Bad([QUICKSTART, "--config.target_coverage=0"], r"target_coverage=0.* \(0, 1\]"),
    "no coverages": Bad([QUICKSTART, "--config.evaluation.coverages=()"], r"coverages=\(\)"),
    "batch too large": Bad(
        [QUICKSTART, "--config.train.batch_size=60000"],
        "train.batch_size=60000 is more than the 54000 training examples",
    ),
    "nothing to train on": Bad(
        [QUICKSTART, "--config.data.calibration_size=60000"],
        "calibration_size=60000: fashion_mnist has 60000 .* use 10 to 59990",
    ),
    "endless warm-up": Bad(
        [QUICKSTART, "--config.train.epochs=0.5"], "warmup_epochs=1 must be less"
    ),
    "workdir is a file": Bad([QUICKSTART, "--workdir=configs/quickstart.py"], "is not a folder"),
    "workdir in a bucket": Bad(
        [QUICKSTART, "--workdir=gs://bucket/run"],
        "--workdir=gs://bucket/run must be a path: .*mount the bucket, .*launch/README.md",
    ),
    **{
        f"{field} in a bucket": Bad(
            [QUICKSTART, f"--config.{field}=gs://bucket/x"],
            f"config.{field}=gs://bucket/x must be a path: .*mount the bucket",
        )
        for field in (
            *("data.data_dir", "data.source", "data.folder", "model.pretrained"),
            "process.compilation_cache",
        )
    },
    "nothing to compare": Bad(["--mode=compare"], "--runs is missing"),
    "no runs": Bad(["--mode=compare", "--runs=runs/x-*"], "--runs=runs/x-. matches no folder"),
    "nothing to vary": Bad([QUICKSTART, "--mode=sweep"], "--vary is missing"),
    "vary what": Bad(
        [QUICKSTART, "--mode=sweep", "--vary=metod=ce"],
        "no field 'metod' .did you mean 'method'",
    ),
    "vary to what": Bad([QUICKSTART, "--mode=sweep", "--vary=seed="], "needs values"),
    "vary twice": Bad(
        [QUICKSTART, "--mode=sweep", "--vary=seed=0", "--vary=seed=1"], "varied twice"
    ),
    "vary without sweep": Bad([QUICKSTART, "--vary=seed=0,1"], "--vary belongs to --mode=sweep"),
    "runs without comparison": Bad(
        [QUICKSTART, "--runs=x"], "--runs, --mixed and --scores belong to"
    ),
    # The config file.
    "syntax": Bad(message="mine.py.*SyntaxError", **file("def get_config(:\n")),
    "not a config": Bad(
        message=r"^sync_jax: --config=mine.py: get_config\(\) returned 3; it must return a Config",
        **file("def get_config():\n  return 3\n"),
    ),
    "a config without return": Bad(
        message=r"^sync_jax: --config=mine.py: get_config\(\) returned None",
        **file("def get_config():\n  pass\n"),
    ),
    "no get_config": Bad(message=r"mine.py: it has no get_config\(\)", **file("get = 1\n")),
    "an end of its own": Bad(
        message="mine.py: line 1: SystemExit: 0", **file("raise SystemExit(0)\n")
    ),
    "an error in get_config": Bad(
        message="--config=mine.py: line 5: FileNotFoundError: .*'nowhere'",
        **changed("open('nowhere')"),
    ),
    "an error in what get_config calls": Bad(
        message=r"--config=mine.py: line 5: JSONDecodeError: .* .\S+decoder.py, line \d+.$",
        **changed("__import__('json').loads('{')"),
    ),
    "misspelt field": Bad(
        message="config.loss.alhpa is no field .did you mean 'loss.alpha'",
        **changed("c.loss.alhpa = 1.0"),
    ),
    "missing fields": Bad(
        message="is missing; begin with sync_jax.config.default_config",
        **file("from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict()\n"),
    ),
    # Values.
    "a bool for an integer": Bad(
        message="config.seed=True must be of type int", **changed("c.seed = True")
    ),
    "a number too large for a float": Bad(
        message="--config=mine.py: line 5: .*int too large to convert to float",
        **changed("c.loss.payoff = 10**400"),
    ),
    "a value that is required": Bad(
        message="the config is not complete: RequiredValueError: None value found",
        **changed("c.seed = config_dict.required_placeholder(int)"),
    ),
    "a null character in a path": Bad(
        message=r"config.data.data_dir='a.x00b' can be no path",
        **changed("c.data.data_dir = 'a\\0b'"),
    ),
    "an endless list": Bad(
        message="evaluation.coverages has 5000 values; at most 1000 will do",
        **changed("c.evaluation.coverages = tuple(i / 50 for i in range(1, 5001))"),
    ),
    "more than float32 holds": Bad(
        [QUICKSTART, "--config.loss.prior_power=1e39"],
        r"prior_power=1e\+39 must be .*1e.30 at most",
    ),
    "a batch for other devices": Bad(
        [*TRAIN, "--workdir=new", "--config.train.batch_size=12"],
        "train.batch_size=12 cannot be split over 8 devices: 12 / 8 = 1.50; use 8 or 16",
    ),
    "duplicate coverages": Bad(
        [QUICKSTART, "--config.evaluation.coverages=(50, 90, 50)"],
        "50, 90, 50. names a value twice",
    ),
    "a method that cannot be imported": Bad(
        [QUICKSTART, "--config.method=nosuchmodule:X"],
        "config.method='nosuchmodule:X' cannot be imported: ModuleNotFoundError",
    ),
    "what is no method": Bad(
        [QUICKSTART, "--config.method=sync_jax.scores:SCORES"], "is a dict, not a Method"
    ),
    "what is no score": Bad(
        [QUICKSTART, "--config.evaluation.scores=sync_jax.methods:METHODS"], "a dict, not a Score"
    ),
    "a payoff beyond the classes": Bad(
        [QUICKSTART, "--config.method=deep_gamblers", "--config.loss.payoff=11"],
        "payoff=11 must be at most the 10 classes",
    ),
    "more steps than can be counted": Bad(
        [QUICKSTART, "--config.train.epochs=1000000"], "epochs=1e.06 must be less than 39768"
    ),
    "an argument of the config": Bad(
        ["--config=configs/quickstart.py:7"], "configs/quickstart.py:7: TypeError: get_config"
    ),
    # Folders for data, and the machine.
    "a network of more than the memory": Bad(
        [*TRAIN, "--workdir=new"],
        r"model.name='cnn' of features=16 and width=4 has .* parameters: the state takes",
        little_memory,
    ),
    "data_dir is empty": Bad([QUICKSTART, "--config.data.data_dir="], "data.data_dir is empty"),
    "data_dir below a file": Bad(
        [QUICKSTART, "--config.data.data_dir=notes.txt/x/y", "--workdir=new"],
        "data.data_dir='.*notes.txt/x/y' cannot be used: Not a directory",
    ),
    "no home folder": Bad([QUICKSTART], "'~/.cache/sync_jax' names a home folder that is", no_home),
    "no device": Bad(
        TRAIN, "JAX finds no device .JAX_PLATFORMS=tqu.: Unable .* JAX_PLATFORMS=cpu", no_device
    ),
    "a full disk": Bad(
        NEW_ALBUM, "needs 10.0 MB to prepare pictures-.*, 0.0 MB are free", full_disk
    ),
    "no network": Bad(
        [QUICKSTART, "--config.data.data_dir=new", "--workdir=run"],
        "fashion_mnist cannot be obtained: .*no apt-get .*say --config.data.source=FOLDER",
        no_network,
    ),
}
