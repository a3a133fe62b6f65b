"""The dashboard, the alerts and README speak of what the server really exposes, and Prometheus understands them.

promtool and prometheus come with Debian's package prometheus; where they are not found, what needs them is skipped.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from serving import running_server
from vaeserve import Client

README = Path(__file__).parents[2] / "README.md"
MONITORING = Path(__file__).parents[2] / "server" / "monitoring"
DASHBOARD = MONITORING / "grafana" / "dashboards" / "vaeserve.json"
DATASOURCE = MONITORING / "grafana" / "provisioning" / "datasources" / "prometheus.yml"
ALERTS = MONITORING / "alerts.yml"
ALERTS_TEST = Path(__file__).parent / "alerts.test.yml"
METRIC = re.compile(r"\b(?:vaeserve|process)_[a-z0-9_]+")
VARIABLES = {"$__rate_interval": "4s", "$model": ".*", "$version": ".*"}
# A healthy server has nothing to show here.
EMPTY_WHEN_HEALTHY = {"Calls that failed, by code"}
SOON_S = 30.0


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """Every panel's title and query, with the dashboard's variables filled in."""
    for panel in panels():
        for target in panel.get("targets", []):
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            yield panel["title"], expression


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not on the path (on Debian: package prometheus)")
    return path


def promtool(*arguments: str | Path, stdin: bytes = b"") -> None:
    done = subprocess.run([tool("promtool"), *arguments], input=stdin, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()


def test_panels_use_the_provisioned_datasource_and_do_not_overlap() -> None:
    uid = re.search(r"uid: (\S+)", DATASOURCE.read_text())
    assert uid is not None
    everything = panels()
    assert len({panel["id"] for panel in everything}) == len(everything)
    for panel in everything:
        assert panel["title"]
        if panel["type"] != "row":
            assert panel["description"], panel["title"]
            assert {target["datasource"]["uid"] for target in panel["targets"]} == {uid[1]}, panel["title"]
    for one, other in itertools.combinations([panel["gridPos"] for panel in everything], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)


def test_prometheus_takes_its_configuration_and_the_alerts() -> None:
    promtool("check", "config", MONITORING / "prometheus.yml")


def test_prometheus_takes_every_query_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": expression} for number, (_, expression) in enumerate(expressions())]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # JSON is YAML
    promtool("check", "rules", file)


def test_alerts_fire_when_they_should_and_not_before(tmp_path: Path) -> None:
    """The cases of alerts.test.yml, which reads alerts.yml beside it."""
    shutil.copy(ALERTS, tmp_path)
    shutil.copy(ALERTS_TEST, tmp_path)
    promtool("test", "rules", tmp_path / ALERTS_TEST.name)


@pytest.fixture(scope="module")
def watched_server(evaluated_models_dir: Path) -> Iterator[tuple[str, str]]:
    """A server that has answered calls: its gRPC target and the address of its metrics."""
    port = free_port()
    with running_server(evaluated_models_dir, metrics_port=port) as server:
        call_everything(server.target)
        yield server.target, f"127.0.0.1:{port}"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def page(watched_server: tuple[str, str]) -> bytes:
    with urllib.request.urlopen(f"http://{watched_server[1]}/metrics", timeout=10) as answer:
        text: bytes = answer.read()
    return text


def call_everything(target: str) -> None:
    with Client(target) as client:
        codes = client.encode(np.zeros((64, 28, 28), np.uint8))
        client.decode(codes)
        client.sample(4, seed=1)


def test_dashboard_and_alerts_ask_for_what_the_server_exposes(watched_server: tuple[str, str]) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    families = list(text_string_to_metric_families(page(watched_server).decode()))
    exposed = {sample.name for family in families for sample in family.samples}
    exposed |= {family.name for family in families if not family.samples}  # nothing to show on a healthy server
    asked = set(METRIC.findall(DASHBOARD.read_text())) | set(METRIC.findall(ALERTS.read_text()))
    assert asked <= exposed, f"not exposed: {sorted(asked - exposed)}"


def test_metrics_are_named_as_prometheus_wants_it(watched_server: tuple[str, str]) -> None:
    promtool("check", "metrics", stdin=page(watched_server))


def test_readme_explains_every_metric_with_its_labels(watched_server: tuple[str, str]) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    labels = {}
    for family in text_string_to_metric_families(page(watched_server).decode()):
        if family.name.startswith("vaeserve_"):
            info = "_info" if family.type == "gauge" and family.name.endswith("_info") else ""
            name = f"{family.name.removesuffix('_info')}{info}{'_total' if family.type == 'counter' else ''}"
            labels[name] = {label for sample in family.samples for label in sample.labels} - {"le"}
    labels["vaeserve_refused_versions"] = {"model", "version"}  # none is refused here
    explained = {}
    for names, by, tells, _ in readme_table():
        assert tells
        for name in re.findall(r"`(\w+)`", names):
            explained[name] = set(re.findall(r"`(\w+)`", by))
    assert explained.pop("process_resident_memory_bytes") == set()
    assert explained == labels


def test_readme_names_every_alert_and_how_long_it_waits() -> None:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    waits = {rule["alert"]: _minutes(rule.get("for", "0m")) for rule in group["rules"]}
    said = {}
    for *_, alert in readme_table():
        if alert:
            name, _, words = alert.partition(": ")
            minutes = re.search(r"for (\d+) min", words)
            said[name] = int(minutes[1]) if minutes else 0
    assert said == waits


def _minutes(duration: str) -> int:
    return int(duration[:-1]) * {"m": 1, "h": 60}[duration[-1]]


def readme_table() -> list[list[str]]:
    """The cells of README's table of metrics."""
    lines = re.findall(r"^\| (`(?:vaeserve|process)_.*) \|$", README.read_text(), re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def test_every_panel_shows_data(watched_server: tuple[str, str], tmp_path: Path) -> None:
    """Prometheus itself scrapes the server and answers the dashboard's queries."""
    target, metrics = watched_server
    config = (MONITORING / "prometheus.yml").read_text()
    config = config.replace("vaeserve:9464", metrics).replace("scrape_interval: 5s", "scrape_interval: 1s")
    (tmp_path / "prometheus.yml").write_text(config)
    shutil.copy(ALERTS, tmp_path)
    address = f"127.0.0.1:{free_port()}"
    options = ["--config.file=prometheus.yml", f"--web.listen-address={address}", "--storage.tsdb.path=data"]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen([tool("prometheus"), *options], cwd=tmp_path, stderr=log) as process,
    ):
        try:
            scrapes = "min(count_over_time(up[1m]))"
            wait_until(lambda: value(address, scrapes) >= 1, "the first scrape")
            call_everything(target)
            wait_until(lambda: value(address, scrapes) >= 4, "four scrapes")
            found = {(title, expression): query(address, expression) for title, expression in expressions()}
        finally:
            process.terminate()
    empty = {title for (title, _), series in found.items() if not series}
    assert empty <= EMPTY_WHEN_HEALTHY, empty


def query(address: str, expression: str) -> list[dict[str, Any]]:
    url = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return result


def value(address: str, expression: str) -> float:
    """The only series' value; 0 while Prometheus starts or has none."""
    try:
        series = query(address, expression)
    except OSError:
        return 0.0
    return float(series[0]["value"][1]) if series else 0.0


def wait_until(reached: Callable[[], bool], what: str) -> None:
    """Poll a process that offers no event to wait for."""
    deadline = time.monotonic() + SOON_S
    while not reached():
        assert time.monotonic() < deadline, f"{what} did not come within {SOON_S} s"
        time.sleep(0.1)
