"""Score the untouched and the spliced model on tasks of lm-evaluation-harness, `pip install mxd[tasks]`."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mxd.modeling_mxd import MxDModel


def find_tasks(names: Sequence[str]) -> Any:
    """Load tasks with their data, and return the harness's `TaskManager` that knows them.

    Args:
        names: names of tasks or groups of lm-evaluation-harness, or paths of YAML files.

    Raises:
        ImportError: lm-evaluation-harness is not installed.
        ValueError: there is no such task.
    """
    try:
        import lm_eval.models.huggingface  # noqa: F401  # it needs more packages than lm_eval itself
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(f"--tasks needs lm-evaluation-harness ({error}): pip install 'mxd[tasks]'") from error
    manager = TaskManager(include_defaults=False)
    try:
        manager.load(list(names))
    except KeyError:  # not all are files: read the harness's own tasks, which takes many seconds
        manager = TaskManager()
        unknown = [name for name in names if name not in manager.task_index and not name.endswith((".yaml", ".yml"))]
        if unknown:
            known = "`lm_eval ls tasks` lists their names; a task of your own is the path of its YAML file"
            raise ValueError(f"lm-evaluation-harness knows no task {unknown[0]!r}: {known}") from None
        manager.load(list(names))
    return manager


def score_tasks(
    model: PreTrainedModel,
    decomposition: MxDModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    manager: Any = None,
    limit: int | None = None,
    batch_size: int = 1,
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Score a model on tasks with its own MLPs, and with the decomposition in their places.

    The decomposition runs in the model's dtype, as `AutoModelForCausalLM` loads it, so that
    `lm_eval --model hf --model_args pretrained=REPO,trust_remote_code=True` gives the same scores.

    Args:
        model, tokenizer: the base model, whose MLPs are in place again afterwards, and its tokenizer.
        decomposition: its decomposition, which is left unchanged.
        names: see `find_tasks`.
        manager: what `find_tasks` returned, if it was called before.
        limit: score the first examples of each task only.
        batch_size: of the harness; scores differ slightly between batch sizes, through rounding.

    Returns:
        {task: {metric: {"untouched", "spliced", and their standard errors over examples, "untouched_stderr" and
        "spliced_stderr", None where the harness knows none}}}. A metric with a filter is "exact_match,strict".
    """
    manager = manager or find_tasks(names)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)

    def run() -> Mapping[str, Any]:
        found = simple_evaluate(harness, tasks=list(names), task_manager=manager, limit=limit, log_samples=False)
        return found["results"]

    untouched = run()
    with copy.deepcopy(decomposition).spliced(model):
        spliced = run()
    return {task: _side_by_side(untouched[task], row) for task, row in spliced.items()}


def _side_by_side(untouched: Mapping[str, Any], spliced: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    scores: dict[str, dict[str, float | None]] = {}
    for key in spliced:
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):  # the others say what was run
            continue
        error = f"{metric}_stderr,{filtered}"
        scores[metric if filtered == "none" else key] = {
            "untouched": _number(untouched[key]),
            "untouched_stderr": _number(untouched.get(error)),
            "spliced": _number(spliced[key]),
            "spliced_stderr": _number(spliced.get(error)),
        }
    return scores


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None  # "N/A" where there is no standard error
