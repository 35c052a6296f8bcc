"""What is checked of a chain before any of it is submitted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.contradictions import check_job
from pipeline.config.schema import Slurm
from pipeline.errors import UsageError
from pipeline.run.identity import settle
from slurm.sbatch import parameters, script
from slurm.submit import submission_lock, submit
from tests.pipeline.runs import contents

OFF = "augment.randaugment={layers: 0, magnitude: 0}"
ON = '"augment.randaugment={layers: 2, magnitude: 5}"'


def test_a_chain_whose_fine_tuning_would_be_refused_is_not_submitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    common = ("data.train=here/train", "data.val=here/val")

    def chain(*more: str, pretraining: tuple[str, ...] = ()) -> int:
        then = " ".join(["configs/tiny_finetune.yaml", f"run.dir={tuned}", *common, *more])
        overrides = [f"run.dir={run}", *common, *pretraining]
        return submit("pretrain", "configs/tiny.yaml", overrides, None, None, then, "slurm", dry_run=True)

    refused = rf"RandAugment \(augment.randaugment={{layers: 2, magnitude: 5.0}}\) is on here .* \({run}\)"
    with pytest.raises(UsageError, match=refused):
        chain(ON, pretraining=(OFF,))
    assert "#SBATCH" not in capsys.readouterr().out and not run.exists() and not tuned.exists()
    assert chain(ON, "augment.allow_new=true", pretraining=(OFF,)) == 0
    assert chain(ON) == 0  # weak in pretraining
    assert capsys.readouterr().out.count("dependency=afterok") == 2


def test_a_restart_that_is_refused_leaves_the_run_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    for file in ("slurm/jobs.jsonl", "checkpoints/step-00000003/manifest.json", "notes.txt"):
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).write_text("mine")
    settle(run)
    before = contents(run)
    seen: list[Path] = []

    def refuse(folder: Path, _: str) -> str:
        seen.extend(run.glob("*"))
        with pytest.raises(UsageError, match="another `coatnet submit` is running"), submission_lock(run):
            pass
        raise UsageError("sbatch refused the job")

    monkeypatch.setattr("slurm.submit.submit_locally", refuse)
    overrides = [f"run.dir={run}", "data.train=here/train", "data.val=null"]
    with pytest.raises(UsageError, match="refused"):
        submit("pretrain", "configs/tiny.yaml", overrides, None, None, None, "local", dry_run=False, restart=True)
    assert sorted(path.name for path in seen) == [".lock", ".submitting", "restarted-1", "run.json", "slurm"]
    (run / ".submitting").unlink()
    assert contents(run) == before and not (run / "restarted-1").exists()


OPTIONAL = {"--dependency", "--exclusive", "--kill-on-invalid-dep", "--propagate", "--wckey"}
"""Options of the script that a person may set otherwise, or add to."""


@pytest.mark.parametrize("array", [False, True])
def test_what_the_batch_script_sets_cannot_be_set_otherwise(tmp_path: Path, array: bool) -> None:
    words: dict[str, Any] = dict.fromkeys(("memory", "partition", "account", "qos", "exclude"), "x")
    everything = Slurm(nodes=4, min_nodes=2, gpus_per_node=2, cpus_per_task=3, **words)
    text = script(tmp_path, "exit", parameters(everything, "name", tmp_path, "afterok:7", array))
    options = set(re.findall(r"^#SBATCH (--[a-z-]+)", text, re.MULTILINE))
    assert options > OPTIONAL
    for option in options - OPTIONAL:
        for abbreviated in (option, option[:-1], "--dep"):
            with pytest.raises(UsageError, match=rf"slurm.sbatch has {abbreviated}=x: "):
                check_job(Slurm(sbatch=(f"{abbreviated}=x",)))


def test_what_is_a_persons_to_choose_reaches_the_batch_script_beside_ours(tmp_path: Path) -> None:
    chosen = ("--dependency=afterok:1", "--hold", "--comment=two words", "--gres=gpu:a100:2", "--propagate=NOFILE")
    chosen += ("--constraint=ib",)
    check_job(slurm := Slurm(gpus_per_node=2, sbatch=chosen))
    lines = script(tmp_path, "exit", parameters(slurm, "name", tmp_path, "afterok:7")).splitlines()
    both = ("--dependency=afterok:7,afterok:1", "--hold", "--comment='two words'", *chosen[3:])
    assert {f"#SBATCH {option}" for option in both} <= set(lines)
    assert not any("gpus-per-node" in line for line in lines)
