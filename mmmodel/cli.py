"""The command line of mmmodel: a multimodal model from raw data to vectors, labels and explanations.

A command is a frozen dataclass whose fields are its flags and whose `run` does the work. Modules that import torch or
decoders are imported in `run`, so that --help answers at once.
"""

import os
import signal
import sys

from mmmodel.limits import FULL, MISSING, RunError

try:
    import tyro
except ModuleNotFoundError as error:  # `pip install .` installs this command too, but only what the kernels need
    sys.exit(MISSING % error.name)

from mmmodel import settings
from mmmodel.commands.training import Ablate, Data, Demo, Evaluate, Finetune, Pretrain
from mmmodel.commands.using import Complexity, Embed, Explain, Export, Plot, Predict
from mmmodel.configs import ConfigError

# What the packages of .[model] are imported as, but for tyro.
PACKAGES = (
    "tokenizers", "safetensors", "PIL", "soundfile", "soxr", "webdataset", "resvg_py", "rich", "matplotlib", "sklearn",
    "pyarrow",
)  # fmt: skip
INTERRUPTED = 130  # exit status after Ctrl-C, as a shell gives it

Command = Data | Pretrain | Finetune | Predict | Evaluate | Embed | Plot | Explain | Complexity | Export | Ablate | Demo


def main(args: list[str] | None = None) -> None:
    """Entry point of the console script and of `python -m mmmodel`.

    What a user or the machine did wrong is one line; anything else is a fault of ours and shows its traceback.
    """
    if (sys.argv[1:] if args is None else args) == ["--version"]:
        from mmkernels import __version__  # imports torch

        print(f"mmmodel {__version__}")
        return
    settings.calm_threads()
    command = None
    try:
        description = __doc__.split("\n")[0] + " --version says which this is."
        command = tyro.cli(Command, args=args, prog="mmmodel", description=description)
        command.run()
    except (ConfigError, RunError) as error:
        sys.exit(str(error))
    except RuntimeError as error:
        from mmkernels import UnavailableError  # imports torch, as whatever raised it did

        if not isinstance(error, UnavailableError):
            raise
        hint = "; --impl auto takes the fastest that can" if hasattr(command, "impl") else ""
        sys.exit(f"{error}{hint}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in PACKAGES:
            raise
        sys.exit(MISSING % error.name)
    except BrokenPipeError:  # `mmmodel ... | head` has read enough; Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:  # a file in a folder's place, no right to write, a full disk
        command = getattr(command, "command", command)  # of `data` the one inside it
        where = error.filename or (getattr(command, "out", None) if error.errno in FULL else None)
        sys.exit(f"{where}: {error.strerror}" if where else str(error))
    except KeyboardInterrupt as error:
        said = str(error) if error.args else "stopped"
        if said:  # "": another rank says it
            print(said, file=sys.stderr)
        sys.exit(INTERRUPTED)
