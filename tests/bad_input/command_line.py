"""Mistakes in the command line, the config and its values, and the machine."""

from tests.bad_input.case import EVALUATE, NEW_ALBUM, RESNET, TRAIN, Bad, changed, file
from tests.bad_input.spoil import full_disk, little_memory, no_device, no_home, no_network
from tests.command_line import QUICKSTART

CASES = {
    # The command line.
    "no config": Bad([], "--config is missing; for example --config=quickstart"),
    "no such file": Bad(
        ["--config=configs/imagnet.py"],
        "imagnet.py is no file .*did you mean 'imagenet100'..; choose from cifar10, .*or name a",
    ),
    "a folder": Bad(["--config=configs"], "--config=configs is no file"),
    "stray argument": Bad([QUICKSTART, "train"], "unexpected argument 'train'"),
    "half of what several processes need": Bad(
        [QUICKSTART, "--processes=2", "--process=0"],
        "--coordinator, --processes and --process belong together",
    ),
    "a process too many": Bad(
        [QUICKSTART, "--coordinator=localhost:1234", "--processes=2", "--process=2"],
        "--process=2 must be between 0 and --processes=2 - 1",
    ),
    "no such port": Bad(
        [QUICKSTART, "--coordinator=localhost:99999", "--processes=2", "--process=0"],
        "--coordinator=localhost:99999 must be HOST:PORT, a port from 1 to 65535",
    ),
    "unknown flag": Bad([QUICKSTART, "--workdri=x"], "Unknown command line flag 'workdri'"),
    "unknown mode": Bad(
        [QUICKSTART, "--mode=tset"],
        "--mode=tset: .*prepare.train.evaluate.sweep.compare.ensemble",
    ),
    "unknown field": Bad(
        [QUICKSTART, "--config.train.epocs=3"],
        "config.train.epocs is no field .did you mean 'train.epochs'..; choose from train.epochs",
    ),
    "unknown section": Bad([QUICKSTART, "--config.trian.epochs=3"], "did you mean 'train.epochs'"),
    "field of a value": Bad([QUICKSTART, "--config.method.x=3"], "config.method.x is no field"),
    "value for a section": Bad([QUICKSTART, "--config.train=3"], "config.train=3"),
    "no number": Bad([QUICKSTART, "--config.train.epochs=many"], "config.train.epochs=many"),
    "no integer": Bad([QUICKSTART, "--config.train.batch_size=1.5"], "config.train.batch_size=1.5"),
    "no boolean": Bad([QUICKSTART, "--config.data.flip=maybe"], "config.data.flip=maybe"),
    "unknown method": Bad(
        [QUICKSTART, "--config.method=snyc"],
        "config.method='snyc' .*did you mean 'sync'.*choose from ccl_sc, ce, deep_gamblers, ",
    ),
    "unknown dataset": Bad(
        [QUICKSTART, "--config.data.name=mnist"],
        "config.data.name='mnist' is unknown.*choose from cifar10, .*fashion_mnist, ",
    ),
    "no data": Bad(
        ["--config=configs/imagenet100.py", "--config.data.data_dir=new"],
        "imagenet100 is not prepared: .*ILSVRC2012_img_train.tar.*image-net.org.*--mode=prepare",
    ),
    "no such source": Bad(
        [
            "--config=configs/stanford_cars.py",
            "--mode=prepare",
            "--config.data.data_dir=new",
            "--config.data.source=nowhere",
        ],
        "data.source='nowhere' does not exist; it must hold cars_train/",
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
    "delta 1": Bad([QUICKSTART, "--config.evaluation.delta=1"], r"delta=1.* in \(0, 1\)"),
    "no coverages": Bad([QUICKSTART, "--config.evaluation.coverages=()"], r"coverages=\(\)"),
    "coverage 101": Bad([QUICKSTART, "--config.evaluation.coverages=(101,)"], r"in \(0, 100\]"),
    "negative seed": Bad([QUICKSTART, "--config.seed=-1"], "config.seed=-1 must be between 0"),
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
    "named folder is missing": Bad(
        [QUICKSTART, "--config.data.source=nowhere", "--config.data.data_dir=new"],
        "data.source='nowhere'",
    ),
    "workdir is a file": Bad([QUICKSTART, "--workdir=configs/quickstart.py"], "is not a folder"),
    "workdir in a bucket": Bad(
        [QUICKSTART, "--workdir=gs://bucket/run"],
        "--workdir=gs://bucket/run must be a path: .*mount the bucket, .*launch/README.md",
    ),
    "comparison in a bucket": Bad(
        ["--mode=compare", "--runs=x", "--workdir=gs://bucket/run"],
        "--workdir=gs://bucket/run must be a path",
    ),
    "runs in a bucket": Bad(
        ["--mode=compare", "--runs=gs://bucket/runs/*"], "--runs=gs://bucket/runs/. must be a path"
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
    "an ensemble of nothing": Bad(["--mode=ensemble"], "--runs is missing"),
    "no runs": Bad(["--mode=compare", "--runs=runs/x-*"], "--runs=runs/x-. matches no folder"),
    "nothing to vary": Bad([QUICKSTART, "--mode=sweep"], "--vary is missing"),
    "vary what": Bad(
        [QUICKSTART, "--mode=sweep", "--vary=metod=ce"],
        "no field 'metod' .did you mean 'method'",
    ),
    "vary to what": Bad([QUICKSTART, "--mode=sweep", "--vary=seed="], "needs values"),
    "vary to another type": Bad(
        [QUICKSTART, "--mode=sweep", "--vary=seed=0,x"],
        "'x' must be of type",
    ),
    "vary twice": Bad(
        [QUICKSTART, "--mode=sweep", "--vary=seed=0", "--vary=seed=1"], "varied twice"
    ),
    "vary to the same": Bad([QUICKSTART, "--mode=sweep", "--vary=seed=1,1"], "names a value twice"),
    "vary to what is refused": Bad(
        [QUICKSTART, "--mode=sweep", "--vary=method=ce,sinc"],
        "config.method='sinc' is unknown",
    ),
    "vary without sweep": Bad([QUICKSTART, "--vary=seed=0,1"], "--vary belongs to --mode=sweep"),
    "runs without comparison": Bad(
        [QUICKSTART, "--runs=x"], "--runs, --mixed and --scores belong to"
    ),
    "nothing to evaluate": Bad(
        [QUICKSTART, "--mode=evaluate"],
        "runs/quickstart-sync-seed0/predictions_calibration.npz is missing",
    ),
    # The config file.
    "syntax": Bad(message="mine.py.*SyntaxError", **file("def get_config(:\n")),
    "no function": Bad(message="mine.py.*get_config", **file("x = 1\n")),
    "not a config": Bad(
        message="mine.py.*must return a ConfigDict", **file("def get_config():\n  return 3\n")
    ),
    "missing import": Bad(
        message="mine.py.*No module named 'nosuchmodule'", **file("import nosuchmodule\n")
    ),
    "an end of its own": Bad(message="mine.py.*SystemExit: 0", **file("raise SystemExit(0)\n")),
    "no text": Bad(message="mine.py cannot be used: .*null bytes", **file("x = 1\0")),
    "misspelt field": Bad(
        message="config.loss.alhpa is no field .did you mean 'loss.alpha'",
        **changed("c.loss.alhpa = 1.0"),
    ),
    "wrong type": Bad(message="mine.py.*'seed'.*one", **changed("c.seed = 'one'")),
    "missing fields": Bad(
        message="is missing; begin with sync_jax.config.default_config",
        **file("from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict()\n"),
    ),
    # Values.
    "a bool for an integer": Bad(
        message="config.seed=True must be of type int", **changed("c.seed = True")
    ),
    "None for a number": Bad(
        message="config.train.epochs=None must be of type float", **changed("c.train.epochs = None")
    ),
    "a number too large for a float": Bad(
        message="--config=mine.py: int too large to convert to float",
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
    "a list for a number": Bad([QUICKSTART, "--config.train.epochs=[1,2]"], "train.epochs=.1,2."),
    "infinite epochs": Bad([QUICKSTART, "--config.train.epochs=inf"], "epochs=inf must be .*1e6"),
    "negative weight decay": Bad(
        [QUICKSTART, "--config.optimizer.weight_decay=-0.1"], "weight_decay=-0.1 .* at least 0"
    ),
    "more than float32 holds": Bad(
        [QUICKSTART, "--config.loss.prior_power=1e39"],
        r"prior_power=1e\+39 must be .*1e.30 at most",
    ),
    "an absurd width": Bad(
        [QUICKSTART, "--config.model.width=1000000"], "width=1000000 must be between 1 and 1024"
    ),
    "an absurd feature vector": Bad(
        [QUICKSTART, "--config.model.features=10000000"], "features=10000000 must be between 1 and"
    ),
    "an absurd picture": Bad(
        [QUICKSTART, "--config.data.image_size=1000000"], "image_size=1000000 must be between 8"
    ),
    "a batch of none": Bad([QUICKSTART, "--config.train.batch_size=0"], "batch_size=0 .* least 1"),
    "a negative batch": Bad(
        [QUICKSTART, "--config.evaluation.batch_size=-8"], "evaluation.batch_size=-8 .* between 1"
    ),
    "a batch for other devices": Bad(
        [*TRAIN, "--workdir=new", "--config.train.batch_size=12"],
        "train.batch_size=12 cannot be split over 8 devices: 12 / 8 = 1.50; use 8 or 16",
    ),
    "negative coverage": Bad(
        [QUICKSTART, "--config.evaluation.coverages=(-5,)"], r"coverages=\(-5,\) .* \(0, 100\]"
    ),
    "duplicate coverages": Bad(
        [QUICKSTART, "--config.evaluation.coverages=(50, 90, 50)"],
        "50, 90, 50. names a value twice",
    ),
    "words for coverages": Bad(
        [QUICKSTART, "--config.evaluation.coverages=('half',)"], "coverages=.*list of percentages"
    ),
    "a risk above 1": Bad(
        [QUICKSTART, "--config.evaluation.target_risks=(2.0,)"], "target_risks=.*error rates in"
    ),
    "momentum of 1.5": Bad(
        [QUICKSTART, "--config.optimizer.momentum=1.5"], r"momentum=1.5 .* in \[0, 1\]"
    ),
    "unknown schedule": Bad(
        [QUICKSTART, "--config.optimizer.schedule=cosin"],
        "schedule='cosin' .*did you mean 'cosine'",
    ),
    "unknown network": Bad(
        [QUICKSTART, "--config.model.name=resnet19"],
        "model.name='resnet19' .*did you mean 'resnet1",
    ),
    "an option of no network": Bad(
        [QUICKSTART, "--config.model.widht=8"],
        "cnn has no option 'widht' .did you mean 'width'..; choose from features, width",
    ),
    "a method that cannot be imported": Bad(
        [QUICKSTART, "--config.method=nosuchmodule:X"],
        "config.method='nosuchmodule:X' cannot be imported: ModuleNotFoundError",
    ),
    "what is no method": Bad(
        [QUICKSTART, "--config.method=sync_jax.scores:SCORES"], "is a dict, not a Method"
    ),
    "a payoff beyond the classes": Bad(
        [QUICKSTART, "--config.method=deep_gamblers", "--config.loss.payoff=11"],
        "payoff=11 must be at most the 10 classes",
    ),
    "more steps than can be counted": Bad(
        [QUICKSTART, "--config.train.epochs=1000000"], "epochs=1e.06 must be less than 39768"
    ),
    "a risk that nothing proves": Bad(
        [*EVALUATE, "--config.evaluation.target_risks=(1e-300,)"], r"target_risks=.*in \[1e-6, 1\)"
    ),
    "a bracket too few": Bad(
        [QUICKSTART, "--config.evaluation.coverages=(50"], r"coverages=\('\(50',\) must be a list"
    ),
    "an argument of the config": Bad(
        ["--config=configs/quickstart.py:7"], "configs/quickstart.py:7: TypeError: get_config"
    ),
    "no value": Bad([QUICKSTART, "--config.seed="], "config.seed=: invalid literal for int"),
    # Folders for data, and the machine.
    "a network of more than the memory": Bad(
        [*TRAIN, "--workdir=new"],
        r"model.name='cnn' of features=16 and width=4 has .* parameters: the state takes",
        little_memory,
    ),
    "data_dir is empty": Bad([QUICKSTART, "--config.data.data_dir="], "data.data_dir is empty"),
    "data_dir is a file": Bad(
        [QUICKSTART, "--config.data.data_dir=notes.txt", "--workdir=new"],
        "notes.txt' is not a fold",
    ),
    "data_dir below a file": Bad(
        [QUICKSTART, "--config.data.data_dir=notes.txt/x/y", "--workdir=new"],
        "data.data_dir='.*notes.txt/x/y' cannot be used: Not a directory",
    ),
    "data_dir that cannot be made": Bad(
        [*NEW_ALBUM, "--config.data.data_dir=/proc/x"], "data_dir='/proc/x' cannot be used: No such"
    ),
    "data_dir of too long a name": Bad(
        [QUICKSTART, f"--config.data.data_dir={'x' * 300}"],
        "data_dir='.*x' cannot be used: File na",
    ),
    "no home folder": Bad([QUICKSTART], "'~/.cache/sync_jax' names a home folder that is", no_home),
    "weights in no home folder": Bad(
        [*RESNET, "--config.model.pretrained=~nobody-at-all/w.pth"], "pretrained=.* must be a file"
    ),
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
