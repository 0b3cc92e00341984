import json

import torch

from cogview_pipelines import __version__, environment


def test_the_report_tells_versions_devices_kernels_and_the_shipped_models(cogview2):
    result = cogview2("doctor", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["versions"]["cogview_pipelines"] == __version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["devices"][0]["device"] == "cpu"
    assert report["devices"][0]["threads"] == torch.get_num_threads()
    assert len(report["devices"]) == 1 + torch.cuda.device_count() + torch.backends.mps.is_available()
    assert report["kernels"]["used_on"].keys() == {"cpu", "cuda"}
    assert report["kernels"]["decode_step"].startswith(
        "used" if report["kernels"]["library"] else "the kernels are not"
    )
    found = {name: shipped["found"] for name, shipped in report["shipped_models"].items()}
    assert found == {
        name: (folder / "model_index.json").is_file() for name, folder in environment.SHIPPED_MODELS.items()
    }


def test_without_json_every_fact_has_a_line(cogview2):
    result = cogview2("doctor")
    assert result.exit_code == 0, result.output
    first_words = [line.split()[0] for line in result.stdout.splitlines()]
    assert {
        "python",
        "torch",
        "transformers",
        "diffusers",
        "accelerate",
        "cpu",
        "kernels",
        "shipped",
        "cogview-emoji",
    } <= set(first_words)


def test_a_package_that_is_not_installed_is_said_to_be(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    assert environment.versions()["no-such-package"] is None
