"""The clients that are tried, the environment of each, and the table in docs/compatibility.md that says how it went."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.processes import ROOT, run

SCRIPTS = Path(__file__).parent / "scripts"
ENVIRONMENTS = Path(sys.prefix) / "clients"
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- clients: made by make test-clients -->\n", "<!-- end of clients -->"


@dataclass(frozen=True)
class Client:
    """A script in `scripts`, and the packages it needs from their registry."""

    title: str
    script: str
    packages: tuple[str, ...]

    @property
    def name(self) -> str:
        return Path(self.script).stem

    def run(self, http: str, grpc: str) -> Outcome:
        """Install what is missing, and run all checks against a live server."""
        command = self._node() if self.script.endswith(".mjs") else self._python()
        printed = run(*command, http, grpc, cwd=ENVIRONMENTS / self.name, seconds=900).stdout
        return Outcome.read(self.title, printed)

    def _python(self) -> list[str | Path]:
        folder = ENVIRONMENTS / self.name
        interpreter = folder / "bin" / "python"
        if not interpreter.exists():
            run(sys.executable, "-m", "venv", folder)
        run(interpreter, "-m", "pip", "install", "--disable-pip-version-check", "-q", *self.packages, seconds=900)
        # Without -P or an inherited path: a user's environment knows nothing of this checkout.
        return [interpreter, "-E", SCRIPTS / self.script]

    def _node(self) -> list[str | Path]:
        folder = ENVIRONMENTS / self.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true}')
        run("npm", "install", "--no-audit", "--no-fund", "--silent", *self.packages, cwd=folder, seconds=900)
        for script in ("report.mjs", self.script):  # modules are looked for beside the script
            shutil.copy(SCRIPTS / script, folder)
        return ["node", folder / self.script]


@dataclass(frozen=True)
class Outcome:
    """How the checks of one client went."""

    title: str
    versions: dict[str, str]
    works: list[str]
    fails: dict[str, str]
    """Why, by check."""

    @classmethod
    def read(cls, title: str, printed: str) -> Outcome:
        """From what a script printed."""
        versions, works, fails = {}, [], {}
        for line in map(json.loads, printed.splitlines()):
            versions |= line.get("versions", {})
            if line.get("works"):
                works.append(line["check"])
            elif "check" in line:
                fails[line["check"]] = line["why"]
        return cls(title, versions, works, fails)

    @property
    def row(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        fails = "; ".join(self.fails) or "–"
        return f"| {self.title} | {versions} | {'; '.join(self.works)} | {fails} |"


CLIENTS = (
    Client("OpenAI, Python", "openai_python.py", ("openai",)),
    Client("OpenAI, Node", "openai_node.mjs", ("openai",)),
    Client("Vercel `ai`", "vercel_ai.mjs", ("ai@6", "@ai-sdk/openai@3", "@ai-sdk/openai-compatible@2")),
    Client("LiteLLM", "litellm_python.py", ("litellm",)),
    Client("LangChain", "langchain_python.py", ("langchain-community", "langchain-openai")),
    Client("Triton", "triton_python.py", ("tritonclient[grpc,http]>=2.50", "protobuf<7")),
    Client("KServe", "kserve_python.py", ("kserve",)),
    Client("gRPC, bare stubs", "bare_stubs.py", ("grpcio", "grpcio-tools", "protobuf")),
)
PROXIED = Client("OpenAI, Python, through nginx", "openai_python.py", ("openai",))
PROMETHEUS = "Prometheus"
TITLES = [*(client.title for client in CLIENTS), PROXIED.title, PROMETHEUS]


def write_rows(outcomes: list[Outcome]) -> None:
    """Put rows into the page's table, in the order of `TITLES`; clients that were not tried keep theirs."""
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    table, _, after = rest.partition(END)
    rows = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("| ")}
    rows |= {outcome.title: outcome.row for outcome in outcomes}
    head = ["| client | version | works | does not |", "|---|---|---|---|"]
    lines = [*head, *(rows[title] for title in TITLES if title in rows)]
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n\n{END}{after}", "utf-8")
