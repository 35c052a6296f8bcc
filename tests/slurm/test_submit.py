"""What is checked of a chain before any of it is submitted."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UsageError
from slurm.submit import submit

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
