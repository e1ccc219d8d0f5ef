"""running/log.py: metrics.jsonl whatever is wrong with wandb; offline runs; bars in logs."""

import gzip
import io
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from time import sleep

from running import log as running_log
from running.device import Runtime
from running.log import SYNC, ProgressBar, RunLog, start_log

import pytest
import torch
from helpers import fine_tune, lines, tiny

import train
from training import finetuning

HERE = Runtime(torch.device("cpu"), 0, 1)
ODD = {
    "WANDB_CONSOLE": "x",
    "WANDB_MODE": "garbage",
    "WANDB_INIT_TIMEOUT": "abc",
    "WANDB_BASE_URL": "::",
    "WANDB_RUN_ID": "a/b",
}


@pytest.mark.parametrize("mode", ["auto", "offline"])
@pytest.mark.parametrize("name", ODD)
def test_a_malformed_variable_of_wandb_is_said_once(tmp_path, monkeypatch, capsys, name, mode):
    import wandb

    wandb.teardown()  # forgets what it has read from the environment
    monkeypatch.setenv(name, ODD[name])
    log = start_log({"wandb_mode": mode}, "train", tmp_path, HERE)
    log.line({"step": 1})
    log.finish()
    wandb.teardown()
    out = capsys.readouterr().out
    assert out.count("\n") <= 2
    assert out.count("wandb: logging failed") <= 1
    assert lines(tmp_path) == [{"step": 1}]


def test_wandb_that_cannot_be_imported_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    log = start_log({"wandb_mode": "offline"}, "train", tmp_path, HERE)
    log.line({"step": 1})
    assert capsys.readouterr().out.count("wandb: logging failed (import of wandb halted") == 1
    assert lines(tmp_path) == [{"step": 1}]


def test_no_script_waits_for_wandb_to_start(tmp_path, capsys):
    class Run:
        offline, logged, finish = True, [], lambda self: None

        def log(self, content, step):
            self.logged.append((step, content))

    begin, run = Event(), Run()
    log = RunLog(tmp_path / "metrics.jsonl", "x", lambda: (begin.wait(20) and run, "offline"))
    assert (log.run, log.run_id, capsys.readouterr().out) == (None, "x", "")
    begin.set()
    log.line({"step": 3, "loss": 1.0})
    log.finish()
    assert (run.logged, capsys.readouterr().out) == ([(3, {"step": 3, "loss": 1.0})], "offline\n")


@pytest.mark.slow
def test_a_resumed_run_that_cannot_go_online_is_logged_offline(tmp_path, monkeypatch, capsys):
    """Regression: its id was in use, by the attempt that had failed, and the run was not logged."""
    import wandb

    wandb.teardown()  # forgets what it has read from the environment
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB__GRAPHQL_RETRY_MAX", "1")  # else it tries again for 30 seconds
    config = {"wandb_mode": "online", "wandb_dir": str(tmp_path)}
    log = start_log(config, "train", tmp_path, HERE, "abcd1234")
    log.line({"step": 1})
    log.finish()
    wandb.teardown()
    assert capsys.readouterr().out.count("wandb: online logging failed (") == 1
    assert len(list(tmp_path.glob("wandb/offline-run-*-abcd1234/*.wandb"))) == 1


@pytest.mark.parametrize("script", ["train", "fine-tuning"])
def test_loader_processes_are_forked_after_wandb_has_begun(
    workplace, dataset, tmp_path, monkeypatch, script
):
    """Also where a run is resumed, which logs nothing before."""
    config, begun, seen = tiny(dataset, tmp_path / "out", max_steps=2), [], []
    if script == "train":
        train.main(config)
    owner = train if script == "train" else finetuning
    iterate = owner.iterate_batches

    def record(*arguments):
        seen.append(len(begun))
        return iterate(*arguments)

    monkeypatch.setattr(owner, "iterate_batches", record)
    monkeypatch.setattr(running_log, "_start_wandb", lambda *_: begun.append(sleep(1)) or (0, ""))
    if script == "train":
        train.main(config | {"max_steps": 4, "wandb_mode": "offline"})
    else:
        fine_tune(workplace, tmp_path / "out", epochs=1, wandb_mode="offline")
    assert seen == [1]


# ---- offline runs --------------------------------------------------------------------------------


def log_in_two_parts(folder):
    """An offline run of steps 0 to 4, resumed for 5 to 8, beside another one: the run's id."""
    config, run_id = {"wandb_mode": "auto", "wandb_dir": str(folder)}, ""
    folder.mkdir(exist_ok=True)
    for steps in (range(5), range(5, 9)):
        log = start_log(config, "train", folder, HERE, run_id)
        for step in steps:
            log.line({"step": step, "loss": 1 / (step + 1)})
        run_id = log.run_id
        log.finish()
    start_log(config, "infer", folder, HERE).finish()
    return run_id


def test_all_offline_runs_lie_in_one_folder_and_a_resumed_one_keeps_its_id(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    run_id = log_in_two_parts(tmp_path / "logs")
    out = capsys.readouterr().out
    line = f"wandb: not logged in, so the run is logged offline; to upload it: {SYNC} logs/wandb"
    assert out.splitlines() == [line] * 3
    files = list((tmp_path / "logs/wandb").glob("offline-run-*/*.wandb"))
    ids = sorted(file.stem.removeprefix("run-") for file in files)
    assert ids.count(run_id) == len(ids) - 1
    assert len(set(ids)) == 2


class FakeServer(BaseHTTPRequestHandler):
    """As much of wandb's server as `wandb sync` needs. It has one run: `history`, its lines."""

    history = []

    def log_message(self, *_):
        pass

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        body = b"{}"
        if self.path.endswith("/graphql"):
            request = json.loads(content)
            body = json.dumps({"data": self.answer(request["query"])}).encode()
        elif self.path.endswith("/file_stream"):
            part = json.loads(content).get("files", {}).get("wandb-history.jsonl")
            if part:
                self.history[part["offset"] :] = map(json.loads, part["content"])
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST

    def answer(self, query):
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
        run = {"id": "r", "name": "r", "displayName": "r", "config": "{}", "tags": []}
        if "upsertBucket" in query:
            return {"upsertBucket": {"bucket": run | {"project": project}, "inserted": True}}
        if "createRunFiles" in query:
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []}}
        if "RunResumeStatus" in query:
            tails = {"historyTail": json.dumps([json.dumps(line) for line in self.history[-1:]])}
            tails |= {"eventsTail": "[]", "summaryMetrics": "{}", "wandbConfig": '{"t": 1}'}
            counts = {"historyLineCount": len(self.history), "eventsLineCount": 0}
            run |= tails | counts | {"logLineCount": 0}
            return {"model": project | {"bucket": run if self.history else None}}
        return {"serverInfo": {"features": []}}


@pytest.mark.slow
@pytest.mark.parametrize("command", [SYNC, "wandb sync"])
def test_the_command_of_the_notice_uploads_a_resumed_run_as_one(tmp_path, command, monkeypatch):
    """Plain `wandb sync` would replace what was logged before the run was stopped."""
    log_in_two_parts(tmp_path)
    monkeypatch.setattr(FakeServer, "history", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    Thread(target=server.serve_forever, daemon=True).start()
    place = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}"}
    place |= {"WANDB_API_KEY": "0" * 40, "PATH": f"{Path(sys.executable).parent}:{os.defpath}"}
    words = ["bash", "-c", f"{command} {tmp_path}/wandb/offline-run-*"]
    subprocess.run(words, env=os.environ | place, cwd=tmp_path, check=True, timeout=100)
    server.shutdown()
    steps = [line["step"] for line in FakeServer.history if "step" in line]
    assert steps == ([*range(9)] if command == SYNC else [*range(5, 9)])


# ---- bars ----------------------------------------------------------------------------------------


def test_a_bar_in_a_log_file_is_a_line_from_time_to_time(monkeypatch):
    """Regression: a log had thousands of carriage returns in one line."""
    text = io.StringIO()
    monkeypatch.setattr(sys, "stderr", text)
    for seconds, least, most in ((1e9, 1, 1), (0, 3, 9)):
        monkeypatch.setattr(running_log, "LINE_SECONDS", seconds)
        text.truncate(0)
        text.seek(0)
        bar = ProgressBar(total=3, unit="step", desc="name", mininterval=0)
        for _ in range(3):
            bar.update()
            bar.set_postfix_str("loss 1")
        bar.close()
        for _ in ProgressBar(range(2), leave=False):
            pass
        lines_of_bar = text.getvalue().splitlines()
        assert least <= len(lines_of_bar) <= most
        assert any(line.startswith("name: step 3 of 3, 00:00 gone") for line in lines_of_bar)
        assert "\r" not in text.getvalue()
    assert any(line.startswith("name: step 2 of 3, 00:00 gone") for line in lines_of_bar)
