import pytest
import torch
from accelerate import Accelerator

from diffusers_byoc.training import (
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from diffusers_byoc.training.checkpoints import check_record, checkpoint_step, read_record


pytestmark = pytest.mark.usefixtures("fresh_state")


class Run:
    """The smallest training run that has all an accelerator saves: model, optimizer, a registered object."""

    def __init__(self):
        self.accelerator = Accelerator(cpu=True)
        model = torch.nn.Linear(3, 2)
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=0.1))
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer.optimizer, lambda step: 0.5**step)
        self.accelerator.register_for_checkpointing(self.lr_scheduler)

    def train(self, steps):
        for step in steps:
            batch = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
            self.accelerator.backward(self.model(batch).square().mean())
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.lr_scheduler.step()

    def weights(self):
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()]).tolist()


def restore(accelerator, directory, name):
    return load_checkpoint(accelerator, find_checkpoint(directory, name))


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_restored_run_goes_on_as_if_unbroken(tmp_path):
    run = Run()
    run.train(range(3))
    assert save_checkpoint(run.accelerator, tmp_path, 3, total_limit=None) == tmp_path / "checkpoint-3"
    run.train(range(3, 6))

    resumed = Run()
    assert restore(resumed.accelerator, tmp_path, "latest") == 3
    resumed.train(range(3, 6))
    assert resumed.weights() == run.weights()


def test_rotation_keeps_the_newest(tmp_path):
    accelerator = Run().accelerator
    for step in (2, 9, 10, 100):  # not in the order of their names as text
        save_checkpoint(accelerator, tmp_path, step, total_limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]


def test_without_a_limit_all_are_kept(tmp_path):
    accelerator = Run().accelerator
    for step in range(1, 5):
        save_checkpoint(accelerator, tmp_path, step, total_limit=None)
    assert len(list_checkpoints(tmp_path)) == 4


def test_later_checkpoints_of_an_earlier_run_are_deleted_not_resumed(tmp_path):
    accelerator = Run().accelerator
    for step in (10, 20, 30):
        save_checkpoint(accelerator, tmp_path, step, total_limit=None)
    save_checkpoint(accelerator, tmp_path, 15, total_limit=2)  # a run that began again from 10
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-15"]


def test_a_half_written_checkpoint_is_neither_listed_nor_in_the_way(tmp_path):
    run = Run()
    save_checkpoint(run.accelerator, tmp_path, 1, total_limit=None)
    partial = tmp_path / "checkpoint-2.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    (partial / "left over").write_bytes(b"")

    assert restore(Run().accelerator, tmp_path, "latest") == 1
    save_checkpoint(run.accelerator, tmp_path, 2, total_limit=None)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert not (tmp_path / "checkpoint-2" / "left over").exists()
    assert restore(Run().accelerator, tmp_path, "latest") == 2


def test_a_save_that_dies_leaves_the_earlier_ones_whole(tmp_path, monkeypatch):
    run = Run()
    save_checkpoint(run.accelerator, tmp_path, 1, total_limit=1)
    monkeypatch.setattr(run.accelerator, "save_state", lambda path: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(run.accelerator, tmp_path, 2, total_limit=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    assert restore(Run().accelerator, tmp_path, "latest") == 1


def test_saving_a_step_again_replaces_it(tmp_path):
    run = Run()
    save_checkpoint(run.accelerator, tmp_path, 1, total_limit=None)
    run.train(range(1))
    save_checkpoint(run.accelerator, tmp_path, 1, total_limit=None)
    resumed = Run()
    restore(resumed.accelerator, tmp_path, "latest")
    assert resumed.weights() == run.weights()


def test_a_checkpoint_by_name_or_path(tmp_path):
    accelerator = Run().accelerator
    for step in (1, 2):
        save_checkpoint(accelerator, tmp_path, step, total_limit=None)
    assert restore(accelerator, tmp_path, "checkpoint-1") == 1
    assert restore(accelerator, tmp_path, str(tmp_path / "checkpoint-2")) == 2


def test_nothing_to_resume(tmp_path):
    assert find_checkpoint(tmp_path / "missing", "latest") is None
    save_checkpoint(Run().accelerator, tmp_path, 1, total_limit=None)
    assert find_checkpoint(tmp_path, None) is None


def test_a_missing_checkpoint_is_an_error_that_lists_the_present_ones(tmp_path):
    accelerator = Run().accelerator
    with pytest.raises(FileNotFoundError, match="checkpoint-7, got none of this name. Name one of: none"):
        restore(accelerator, tmp_path, "checkpoint-7")
    save_checkpoint(accelerator, tmp_path, 4, total_limit=None)
    with pytest.raises(FileNotFoundError, match="Name one of: checkpoint-4"):
        restore(accelerator, tmp_path, "checkpoint-7")


def test_a_folder_that_is_no_checkpoint_is_an_error(tmp_path):
    (tmp_path / "weights").mkdir()
    with pytest.raises(ValueError, match="checkpoint-STEP"):
        restore(Run().accelerator, tmp_path, "weights")
    for name in ("checkpoint-", "checkpoint-2.partial", "checkpoint-x", "old-checkpoint-2"):
        with pytest.raises(ValueError, match="checkpoint-STEP"):
            checkpoint_step(tmp_path / name)


class Killed(BaseException):
    pass


def test_killed_at_any_moment_of_a_save_the_latest_is_whole(tmp_path, monkeypatch):
    """Before and after every change that a save makes to the disk, with old checkpoints on both sides of it."""
    import shutil
    from pathlib import Path

    def save_and_die(folder, moment):
        run, moments = Run(), []
        for step in (1, 2, 9):
            run.train([step])
            save_checkpoint(run.accelerator, folder, step, total_limit=None)

        def dying(original):
            def call(*arguments, **options):
                for _ in "before", "after":
                    moments.append(original)
                    if len(moments) == moment:
                        raise Killed
                    result = original(*arguments, **options) if len(moments) % 2 else result  # noqa: F821
                return result

            return call

        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", dying(shutil.rmtree))
            patch.setattr(Path, "rename", dying(Path.rename))
            patch.setattr(Path, "replace", dying(Path.replace))
            patch.setattr(run.accelerator, "save_state", dying(run.accelerator.save_state))
            try:
                save_checkpoint(run.accelerator, folder, 3, total_limit=1)
            except Killed:
                return True
        return False

    moment = 1
    while save_and_die(folder := tmp_path / str(moment), moment):
        step = restore(Run().accelerator, folder, "latest")
        assert step in (2, 3, 9)
        for path in list_checkpoints(folder):  # every one of them, not the latest alone
            assert restore(Run().accelerator, folder, path.name) == int(path.name.split("-")[1])
        moment += 1
    assert moment > 12 and [path.name for path in list_checkpoints(folder)] == ["checkpoint-3"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write\nfailed")])
def test_a_full_disk_is_one_line_and_leaves_no_half_checkpoint(tmp_path, monkeypatch, error):
    run = Run()
    save_checkpoint(run.accelerator, tmp_path, 1, total_limit=1)

    def fill(path):
        (tmp_path / "checkpoint-2.partial" / "half").write_bytes(b"half")
        raise error

    monkeypatch.setattr(run.accelerator, "save_state", fill)
    with pytest.raises(CheckpointError, match="go on from checkpoint-1 with --resume_from_checkpoint latest") as e:
        save_checkpoint(run.accelerator, tmp_path, 2, total_limit=1)
    assert "\n" not in str(e.value) and names(tmp_path) == ["checkpoint-1"]


def test_the_scaler_of_fp16_is_in_the_checkpoint(tmp_path):
    run = Run()
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    run.accelerator.scaler._lazy_init_scale_growth_tracker("cpu")
    save_checkpoint(run.accelerator, tmp_path, 1, total_limit=1)
    resumed = Run()
    resumed.accelerator.scaler = torch.amp.GradScaler("cpu")
    restore(resumed.accelerator, tmp_path, "latest")
    assert resumed.accelerator.scaler.get_scale() == 2.0**7


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path):
    record = {"learning_rate": 0.1, "sizes": (1, 2), "label": None}
    path = save_checkpoint(Run().accelerator, tmp_path, 1, None, record)
    check_record(path, record)
    check_record(path, record | {"of a newer version": 1})
    for changed in ({"learning_rate": 0.2}, {"sizes": (1, 3)}, {"label": "a"}):
        (name,) = changed
        with pytest.raises(CheckpointError, match=rf"Expected {name} .*checkpoint-1 was made, got .* Give the same"):
            check_record(path, record | changed)


def test_a_checkpoint_without_a_record_is_taken_as_it_is(tmp_path):
    """As earlier versions wrote them."""
    run = Run()
    run.train(range(1))
    path = save_checkpoint(run.accelerator, tmp_path, 1, None, {"learning_rate": 0.1})
    (path / "settings.json").unlink()
    assert read_record(path) == {}
    check_record(path, {"learning_rate": 0.2})
    resumed = Run()
    assert restore(resumed.accelerator, tmp_path, "latest") == 1 and resumed.weights() == run.weights()


def test_another_precision_may_go_on(tmp_path):
    """From float32 to fp16, whose scaler begins anew, and back."""
    run = Run()
    run.train(range(1))
    save_checkpoint(run.accelerator, tmp_path, 1, total_limit=None)
    scaled = Run()
    scaled.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    scaler._lazy_init_scale_growth_tracker("cpu")
    assert restore(scaled.accelerator, tmp_path, "latest") == 1 and scaled.weights() == run.weights()
    assert scaled.accelerator.scaler is scaler and scaler.get_scale() == 2.0**7
    save_checkpoint(scaled.accelerator, tmp_path, 2, total_limit=None)
    back = Run()
    assert restore(back.accelerator, tmp_path, "latest") == 2 and back.weights() == run.weights()
