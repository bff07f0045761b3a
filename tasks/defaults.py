"""What a task is where its own file (p3.py, …) says nothing else."""

import run
import tasks
from data import PLAIN, Episode, EpisodeBatches, Example
from lora import save_tensors

OPTIONS = {}  # its own options: name -> run.option(…)
WITHOUT = ("instruction_downstream",)  # options that mean nothing to it
ONE_SET = False  # whether its examples are given, so that there is only one set of them
WAYS = True  # whether its examples can become a prefix in other ways than the paper's (run.compression_of)
LAYOUT = PLAIN  # for one's own examples (tools.answer)
evaluate = None  # (run) -> results and table, instead of eval.evaluate
prefix_of = None  # (run, task number) -> Gists, where prefixes are trained themselves: no hypernetwork's

build = run.build


def score(answer: str, query: Example) -> float:
    """Of one answer, in percent."""
    return 100.0 * (answer == query.target)


def save(hyper, out, tensors, args) -> None:
    """What training leaves behind: LoRA sets and gist embeddings (or prefixes)."""
    save_tensors(out / "adapters.safetensors", tensors, hyper.belongs_to)


def restore(args, folder):
    """The model as a finished run left it."""
    return run.load_adapters(tasks.find(args.task).build(args), folder)


def check(args) -> None:
    """InputError for options that don't go together."""


def batches(a_run) -> EpisodeBatches:
    """(seed, numbers of rows) -> data.Batch."""
    args = a_run.args
    tasks = a_run.task.load(args, a_run.formatter, "train")
    hyper = a_run.hyper
    return EpisodeBatches(
        tasks, a_run.formatter, args.method, args.shots, hyper.gist_ids, hyper.compression, a_run.instruct
    )


def watched(a_run):
    """The run whose held-out tasks are scored along the way and at the end."""
    return a_run


def without_a_model(episodes: list[list[Episode]]) -> dict:
    """Scores of answers that need no model: name -> task -> draw."""
    return {}


def shard(hyper) -> None:
    """Divide the model among processes, where all of it is trained."""


def start(a_run, out, train) -> None:
    """What has to be trained before the run itself (prefix tuning)."""
