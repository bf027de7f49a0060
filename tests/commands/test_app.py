import pytest

from diffusers_byoc.commands import app


def test_it_listens_to_this_machine_alone_unless_told(monkeypatch):
    monkeypatch.delenv("GRADIO_SERVER_NAME", raising=False)
    assert app.parse_args(["--pretrained", "x"]).host == "127.0.0.1"
    assert app.parse_args(["--pretrained", "x", "--host", "0.0.0.0"]).host == "0.0.0.0"
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")  # as a Space sets it
    assert app.parse_args(["--pretrained", "x"]).host == "0.0.0.0"


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("me.org", False)],
)
def test_names_are_typed_only_where_nobody_else_can(host, expected):
    assert app.is_loopback(host) is expected


def test_the_pipelines_of_a_clone_are_offered(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        app.parse_args([])
    assert "--pretrained: expected a pipeline, got none" in capsys.readouterr().err
    (tmp_path / "pretrained" / "mine").mkdir(parents=True)
    (tmp_path / "pretrained" / "mine" / "model_index.json").touch()
    assert app.parse_args([]).pretrained == ["pretrained/mine"]


def test_a_pipeline_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="byoc-app: error: "):
        app.main(["--pretrained", str(tmp_path / "nothing")])
