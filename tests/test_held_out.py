"""--held_out: the student is compared with its teacher on images that it is not trained on."""

import json

import nets
import pytest
import torch
from conftest import rows
from resuming import checkpoint_of, same

from datafree import cost, report
from datafree.network import Network


@pytest.fixture
def earlier(distil):
    """The folder of a run whose pool is held out."""
    return distil("--seed", 7, "--epochs", 1, tag="earlier")


def student_of(folder):
    return torch.load(folder / "checkpoints" / "model_last.pth", weights_only=True)["state_dict"]


def agreement(folder, teacher, earlier):
    """In per cent, by the files alone."""
    images = checkpoint_of(earlier)["source"]["pool"]["images"].float() / 255
    student, teacher = [
        Network.from_file(file, nets.name(model)).eval() for file, model in ((folder, "small"), (teacher, "tiny"))
    ]
    with torch.no_grad():
        return 100 * (student(images).argmax(1) == teacher(images).argmax(1)).float().mean().item()


def test_each_evaluation_states_the_agreement_and_the_training_stays_the_same(distil, teacher, earlier):
    words = ("--eval", "none", "--epochs", 3)
    plain = distil(*words, tag="plain")
    folder = distil(*words, "--held_out", earlier, "--eval_every", 2, tag="compared")
    found = [row.get("agreement") for row in rows(folder)]
    assert [value is None for value in found] == [True, False, False]
    assert found[-1] == pytest.approx(agreement(folder, teacher, earlier))
    assert not any("acc1" in key for key in rows(folder)[-1])
    assert json.loads((folder / "summary.json").read_text())["agreement"] == found[-1]
    assert f"Agreement={found[-1]:.4f}" in (folder / "log.txt").read_text()
    assert same(student_of(plain), student_of(folder))


def test_it_stands_beside_the_accuracy_and_in_a_report(distil, earlier, capsys):
    folder = distil("--epochs", 2, "--held_out", earlier)
    assert {"acc1", "agreement", "best_acc1"} <= rows(folder)[-1].keys()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["report", str(folder), "--of", "agreement"])
        report.main()
    assert f"{rows(folder)[-1]['agreement']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("words, tested", [((), 355), (("--eval", "none"), 0)])
def test_a_dry_run_counts_the_held_out_images(words, tested, distil, earlier, monkeypatch):
    counted, amounts_of = [], cost.amounts_of
    monkeypatch.setattr(cost, "amounts_of", lambda *given: counted.append(given) or amounts_of(*given))
    distil(*words, "--held_out", earlier, "--dry_run")
    [(_, _, images, _, phases)] = counted
    assert images == tested + len(checkpoint_of(earlier)["source"]["pool"]["images"])
    assert phases.keys() >= {"evaluation", "teacher"}


def test_a_quantised_network_is_compared_with_its_own_in_float(quantised, earlier):
    folder = quantised("--eval", "none", "--held_out", earlier)
    assert 0 < rows(folder)[-1]["agreement"] <= 100


def test_what_cannot_be_held_out_is_one_sentence(distil, refused, earlier, tmp_path):
    message = refused(distil, "--method", "folder", "--pool_images", earlier, "--held_out", earlier, code=2)
    assert "has images of --pool_images" in message and "on which the student is trained" in message
    message = refused(distil, "--method", "folder", "--pool_images", earlier, "--held_out", earlier / "grids", code=2)
    assert "has images of --pool_images" in message
    assert "--held_out nowhere: there is no such folder" in refused(distil, "--held_out", "nowhere", "--dry_run")
    assert "eval_every" in refused(distil, "--eval", "none", "--eval_every", 2, code=2)
