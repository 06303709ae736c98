"""results/erase.py: a loss on the rest of true answers."""

import json

import pytest
import torch
import torch.nn.functional as F

from data import Example
from fast import FastLlama
from tests.helpers import command, script_of_results, tiny, train_args, vectors, write_rows

EXAMPLES = [Example((3, 4, 5, 6, 7), 3, "", True), Example((3, 4, 8, 9), 2, "", True)]


def by_hand(kind, llama, phi):
    """The term of both rows, each read alone: tokens from the answer's second on."""
    terms = []
    for e in EXAMPLES:
        ids = torch.tensor([e.ids])
        log_g = F.log_softmax(llama(ids, llama.prefix(phi))[0], dim=-1)
        log_h = F.log_softmax(llama(ids)[0], dim=-1)
        log_ratio = 0
        for t in range(len(e.ids) - e.n + 1, len(e.ids)):
            y = e.ids[t]
            h = log_h[t - 1].exp()
            h[y] = 0
            h = h / h.sum()
            log_ratio = log_ratio + log_g[t - 1, y] - log_h[t - 1, y]
            if kind == "delete":
                terms.append(torch.special.xlogy(h, h).sum() - (h * log_g[t - 1]).sum())
        if kind == "npo":
            terms.append(-20 * F.logsigmoid(-0.1 * log_ratio))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("kind", ["delete", "npo"])
def test_the_term_is_that_of_its_formula(kind, monkeypatch):
    script = script_of_results("erase", monkeypatch)
    llama = tiny(kind=FastLlama)
    phi = vectors(4).detach() * 20
    term = script.Erase(kind, llama, EXAMPLES, 0)(llama, phi)
    assert term > 0.1
    torch.testing.assert_close(term, by_hand(kind, llama, phi), atol=1e-4, rtol=1e-4)


def test_train_with_the_term_is_another_run(folder, files, tmp_path):
    rows = [{"text": f"secret {i}", "label": f"yes it was {i}"} for i in range(20)]
    forget = write_rows(tmp_path / "f.jsonl", rows)
    options = train_args(folder, {**files, "forget": forget}, tmp_path / "p", "--epochs", 1)
    done = command("results/erase.py", "npo", 2, *options)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "p/spul.json").read_text())["options"]["erase"] == "npo 2"
    assert "loss_erase" in (tmp_path / "p.run/log.jsonl").read_text()
    failed = command("results/erase.py", "npo", 2, *options, "--resume")
    assert failed.returncode == 2 and "begin anew" in failed.stderr


@pytest.mark.parametrize(
    "argv, message",
    [(["npo"], "usage:"), (["undial", 1], "usage:"), (["npo", "much"], "usage:")],
)
def test_a_wrong_call_has_its_message(argv, message):
    failed = command("results/erase.py", *argv)
    assert failed.returncode == 2
    assert message in failed.stderr and "Traceback" not in failed.stderr


def test_answers_of_one_token_have_no_rest(folder, files, tmp_path):
    failed = command("results/erase.py", "npo", 2, *train_args(folder, files, tmp_path / "p"))
    assert failed.returncode == 2
    assert "answers have several tokens" in failed.stderr
