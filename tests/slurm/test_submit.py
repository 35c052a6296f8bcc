"""What is checked of a chain before any of it is submitted."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.run.identity import settle
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
        with pytest.raises(UsageError, match="another `coatnet submit` is at work"), submission_lock(run):
            pass
        raise UsageError("sbatch refused the job")

    monkeypatch.setattr("slurm.submit.submit_locally", refuse)
    overrides = [f"run.dir={run}", "data.train=here/train", "data.val=null"]
    with pytest.raises(UsageError, match="refused"):
        submit("pretrain", "configs/tiny.yaml", overrides, None, None, None, "local", dry_run=False, restart=True)
    assert sorted(path.name for path in seen) == [".lock", ".submitting", "restarted-1", "run.json", "slurm"]
    (run / ".submitting").unlink()
    assert contents(run) == before and not (run / "restarted-1").exists()
