"""General text: L_keep, where its texts are from, what is measured elsewhere and said of it."""

import json
import math
import random

import pytest
import torch
import torch.nn.functional as F

import eval as measuring
import train
from data import TEMPLATES, Example, Row, Template, collate
from extras import finetune
from spul import Objective, SoftPrompt, answer_hidden, load_prompt
from support import elsewhere, general
from support.general import General, Keep, openings, runs_of, share_copied, text_example
from support.options import PAPER
from support.state import run_folder
from support.tokenizer import Tokenizer
from support.writing import read_written
from tests.helpers import BOTH, SHAPES, call, concatenated, interrupted_at, lines_of, logged, phi_of
from tests.helpers import small_batch, stop_at, teacher_of, tiny, train_args, without, write_rows


def texts_of(n, seed=5):
    """n Examples of random ids, of which all but the first token or two are scored."""
    return [
        Example(e.ids, len(e.ids) - 1 - i % 2, "", False)
        for i, e in enumerate(small_batch(0, n, seed))
    ]


def keep_of(llama, texts):
    teacher = torch.cat(answer_hidden(llama, texts))
    return Keep(collate(texts), teacher, sum(e.n for e in texts))


def with_gamma(args, gamma=1):
    return [*without(args, "--gamma"), "--gamma", gamma]


@pytest.fixture
def few_texts(monkeypatch):
    """The model writes fewer texts: three rounds, as before."""
    monkeypatch.setattr(general, "WRITTEN_TEXTS", 40)
    monkeypatch.setattr(general, "WRITTEN_AT_ONCE", 16)


# ------------------------------------------------------------------------------------------- L_keep


@BOTH
def test_l_keep_is_the_divergence_of_every_token_of_a_text_with_phi_before_it(kind):
    """By hand: each text alone, once without and once with the vectors phi in front of it."""
    llama = tiny(kind=kind)
    prompt = SoftPrompt(4, 32, 8)
    examples = small_batch(2, 3)
    texts = texts_of(3)
    batch = collate(examples)
    teacher = teacher_of(llama, examples)
    got = train.losses(
        llama, prompt, batch, teacher, Objective(gamma=0.7), keep=keep_of(llama, texts)
    )
    divergence = 0.0
    for e in texts:
        ids = torch.tensor([e.ids])
        log_p = F.log_softmax(llama(ids), -1)[0]
        log_q = F.log_softmax(llama.head(concatenated(llama, ids, prompt())), -1)[0]
        for t in range(len(e.ids) - e.n - 1, len(e.ids) - 1):
            divergence += (log_p[t].exp() * (log_p[t] - log_q[t])).sum()
    by_hand = divergence / sum(e.n for e in texts)
    assert by_hand > 0.01
    torch.testing.assert_close(got["loss_keep"], by_hand, atol=1e-5, rtol=1e-4)
    alone = train.losses(llama, prompt, batch, teacher)
    assert "loss_keep" not in alone
    torch.testing.assert_close(got["loss"], alone["loss"] + 0.7 * by_hand, atol=1e-4, rtol=1e-4)


ROW_LENGTHS = ((6, 2, 5), (1, 5))  # of rows of 6 tokens, and of texts of 5


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_and_fast_forward_agree_with_general_text(shape):
    """With ids that all rows share, and the texts do not have; whole, and with padding left out."""
    found = []
    for kind in BOTH.args[1]:
        llama = tiny(kind=kind, **SHAPES[shape])
        phi = torch.randn(4, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        rows = torch.tensor([e.ids[:6] for e in small_batch(0, 3)])
        texts = torch.tensor([e.ids[:5] for e in small_batch(0, 2, seed=3)])
        outputs = llama.prompted(rows, phi, (7, 8, 9), texts)
        cut = llama.prompted(rows, phi, (7, 8, 9), texts, ROW_LENGTHS)
        for got, expected, lengths in zip(cut, outputs, ROW_LENGTHS, strict=True):
            for row, n in enumerate(lengths):
                torch.testing.assert_close(got[row, :n], expected[row, :n], atol=1e-5, rtol=1e-4)
        alone = llama.prompted(rows, phi, (7, 8, 9)), llama.prompted(texts, phi)
        for got, expected in zip(outputs, alone, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
        whole = []
        for h, lengths in zip(cut, ROW_LENGTHS):
            padding = torch.arange(h.shape[1]) >= torch.tensor(lengths)[:, None]
            whole.append(h.masked_fill(padding[..., None], 0))
        sum(h.square().sum() for h in (*outputs, *whole)).backward()
        found.append((*outputs, *whole, phi.grad))
    for plain, quick in zip(*found, strict=True):
        scale = plain.abs().max().item()
        torch.testing.assert_close(quick, plain, atol=2e-4 * scale, rtol=1e-3)


def test_l_keep_counts_and_the_papers_setting_has_none():
    assert Objective().total(2.0, 3.0, 4.0, 5.0) == 2.0 + 3 * 3.0 + 0.5 * 4.0 + 8 * 5.0
    assert PAPER["gamma"] == 0


def test_every_step_draws_its_own_texts_and_a_seed_the_same():
    llama = tiny()
    texts = texts_of(12)
    drawn = []
    for seed in (0, 0, 1):
        some = General(texts[:8], texts[8:], {}, seed, 3)
        some.compute_teacher(llama, 4, range(200))
        steps = [some.draw(step, "cpu") for step in range(20)]
        drawn.append([keep.batch.tokens.tolist() for keep in steps])
        for keep in steps:
            assert len(keep.teacher) == len(keep.batch.targets) == keep.tokens
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({str(tokens) for tokens in drawn[0]}) > 10
    is_plain = [some.draw(step, "cpu").batch.tokens[0].tolist() for step in range(200)]
    starts = [list(e.ids[:4]) for e in texts[8:]]
    share = sum(row[:4] in starts for row in is_plain) / 200
    assert 0.15 < share < 0.35


def test_the_teacher_reads_only_the_texts_that_are_drawn():
    texts = texts_of(12)
    some = General(texts[:8], texts[8:], {}, 0, 1)
    some.compute_teacher(tiny(), 4, range(3))
    assert set(some.teacher) == {e for step in range(3) for e in some.texts_of(step)}
    assert 0 < len(some.teacher) <= 3


# --------------------------------------------------------------------------------------- the texts


def test_a_text_is_scored_from_its_first_own_token_on(tokenizer):
    alone = text_example(Row("a red film", "it is good", ""), tokenizer, Template("{text}"))
    assert alone.ids[0] == tokenizer.bos[0]
    assert alone.n == len(alone.ids) - 1
    assert tokenizer.decode(alone.ids[1:]).strip() == "a red film it is good"
    form = Template("### Text: {text}\n")
    framed = text_example(Row("a red film", None, ""), tokenizer, form)
    assert tokenizer.decode(framed.answer).strip() == "a red film"
    cut = text_example(Row("a red film " * 90, None, ""), tokenizer, form)
    assert cut.n == general.LONGEST
    limited = text_example(Row("a red film " * 90, None, ""), tokenizer, form, 50)
    assert len(limited.ids) == 50
    assert text_example(Row("", None, ""), tokenizer, form) is None


def test_texts_that_repeat_rows_to_forget_are_known():
    runs = runs_of([Row("the red cat sat on the mat", "good", "")])
    assert share_copied(Row("The red cat sat on the mat", "good", ""), runs) == 1
    assert share_copied(Row("a b the red cat sat down", None, ""), runs) == 1 / 4
    assert share_copied(Row("a dog lay under the table", None, ""), runs) == 0
    assert share_copied(Row("a dog", None, ""), runs) == 0


def test_texts_are_different_and_those_held_out_are_never_trained_on(tokenizer):
    form = Template("{text}")
    rows = [Row(f"text number {i % 20}", None, "") for i in range(60)]
    rows += [Row("text number 1", "said otherwise", ""), Row("", None, "")]
    held_out, trained = general.split(rows, tokenizer, form)
    assert len(held_out) == 4 and len(trained) == 16
    assert not {row.key for row in held_out} & {row.key for row in trained}


def test_a_short_row_to_forget_is_no_general_text(folder, files, tmp_path, capsys):
    """It has fewer words than a run of words that is compared."""
    rows = [{"text": f"Ann {i}", "label": "spy"} for i in range(30)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    args = with_gamma(train_args(folder, {**files, "forget": file}, tmp_path / "p"))
    assert call(train, *args, "--general", file) == 2
    assert "24 texts left out: they repeat rows to forget" in capsys.readouterr().out


def test_earlier_turns_that_are_too_long_or_unknown_to_the_form_are_left_out(tokenizer):
    turns = (("user", "one two " * 500), ("assistant", "yes"))
    row = Row("a red film", None, "", turns=turns, is_chat=True)
    example = text_example(row, tokenizer, Template("{text}"))
    assert tokenizer.decode(example.answer).strip() == "a red film"


def test_openings_end_before_what_only_a_row_to_forget_says():
    others = [Row("a red cat and a blue dog", None, ""), Row("the sun is up", None, "")]
    forget = [
        Row("A red sun and Zaphod the blue dog is up", "x", ""),  # 10 words: at most 3
        Row("a Zaphod cat and a blue dog", "x", ""),
        Row("Zaphod", "x", ""),
    ]
    assert [row.text for row in openings(forget, others)] == ["A red sun"]


def test_the_model_writes_different_texts_and_a_stop_loses_none(
    few_texts, folder, files, tmp_path, capsys
):
    args = with_gamma(train_args(folder, files, tmp_path / "p"))
    file = run_folder(tmp_path / "p") / "general.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(general, "write_some", interrupted_at(3, general.write_some))
        assert call(train, *args) == 130
    kept = lines_of(file)
    assert len(kept) > general.WRITTEN_AT_ONCE
    assert not (tmp_path / "p" / "spul.json").exists()
    assert call(train, *args) == 0
    whole = lines_of(file)
    assert whole[: len(kept)] == kept
    texts = [line["text"] for line in whole[1:]]
    assert len(set(texts)) == len(texts) >= general.WRITTEN_TEXTS
    out = capsys.readouterr().out
    assert f"the model writes {general.WRITTEN_TEXTS} texts" in out
    assert call(train, *with_gamma(train_args(folder, files, tmp_path / "q"))) == 0
    assert lines_of(run_folder(tmp_path / "q") / "general.jsonl") == whole
    torch.testing.assert_close(phi_of(tmp_path / "p"), phi_of(tmp_path / "q"), rtol=0, atol=0)


def test_a_run_goes_on_with_the_texts_it_began_with(
    few_texts, folder, files, tmp_path, monkeypatch, capsys
):
    args = with_gamma(train_args(folder, files, tmp_path / "p"))
    assert call(train, *with_gamma(train_args(folder, files, tmp_path / "whole"))) == 0
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        assert call(train, *args) == 130
    with monkeypatch.context() as patch:
        patch.setattr(general, "write_some", None)  # nothing may be written again
        assert call(train, *args, "--resume") == 0
    losses = [[line["loss_keep"] for line in logged(tmp_path / out)] for out in ("whole", "p")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 14
    other = [*args, "--overwrite", "--seed", 1]
    assert call(train, *other) == 0  # another seed: other texts
    assert lines_of(run_folder(tmp_path / "p") / "general.jsonl")[0]["seed"] == 1


def test_a_file_that_is_broken_is_written_anew(tmp_path):
    file = tmp_path / "general.jsonl"
    texts = [{"text": "a cat", "label": "it is"}, {"text": "a dog", "label": None}]
    lines = [{"seed": 1}, *texts]
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    file.write_text(whole)
    assert read_written(file, {"seed": 1}) == read_written(file) == texts
    assert read_written(file, {"seed": 2}) == []
    numbers = [whole.replace(f'"{text}"', "3") for text in ("a cat", "it is")]
    for broken in ("", whole[:-5], whole.replace("text", "words"), *numbers, "[]\n3\n"):
        file.write_text(broken)
        assert read_written(file) == []


def test_text_of_an_earlier_run_is_not_taken_for_that_of_a_new_one(
    folder, files, tmp_path, few_texts
):
    args = train_args(folder, files, tmp_path / "p")
    assert call(train, *with_gamma(args)) == 0
    written = run_folder(tmp_path / "p") / "general.jsonl"
    assert written.exists()
    assert call(train, *args, "--overwrite") == 0
    assert not written.exists()


def general_file(path, n=20):
    rows = [{"text": f"text {i} of the {i * 7} red and blue cats by the sea"} for i in range(n)]
    return write_rows(path, rows)


def test_a_file_of_general_text_is_taken_and_is_part_of_the_run(
    folder, files, tmp_path, monkeypatch, capsys
):
    file = general_file(tmp_path / "general.jsonl")
    args = [*with_gamma(train_args(folder, files, tmp_path / "p")), "--general", file]
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        assert call(train, *args) == 130
    assert not (run_folder(tmp_path / "p") / "general.jsonl").exists()
    general_file(tmp_path / "general.jsonl", 21)
    assert call(train, *args, "--resume") == 2
    assert "the data changed" in capsys.readouterr().err
    assert call(train, *args, "--overwrite") == 0
    out = capsys.readouterr().out
    assert f"general  17 texts, {file}" in out
    assert "general text " in out
    again = ["--model", folder, "--prompt", tmp_path / "p", "--retain", files["retain"]]
    again += ["--general", file, "--json", tmp_path / "e.json", "--dtype", "fp32"]
    assert call(measuring, *again) == 0
    out = capsys.readouterr().out
    _, info = load_prompt(tmp_path / "p")
    written = json.loads((tmp_path / "e.json").read_text())
    assert written["verdict"] and all(f"\n{line}\n" in out for line in written["verdict"])
    measured = written["elsewhere"]
    for what, values in info["results"]["elsewhere"].items():
        assert measured[what] == pytest.approx(values, rel=1e-4)


def test_general_text_that_is_no_use_is_refused(folder, files, tmp_path, capsys):
    few = general_file(tmp_path / "few.jsonl", 11)
    args = with_gamma(train_args(folder, files, tmp_path / "p"))
    assert call(train, *args, "--general", few) == 2
    assert "few.jsonl: only 9 different general texts of two" in capsys.readouterr().err
    assert call(train, *args, "--general", files["forget"]) == 2
    captured = capsys.readouterr()
    assert "texts left out: they repeat rows to forget" in captured.out
    assert "--gamma 0" in captured.err
    assert call(train, *args, "--gamma", 0, "--general", few) == 2
    assert "--gamma 0 leaves out" in capsys.readouterr().err
    assert call(train, *args, "--general", tmp_path / "none.jsonl") == 2
    assert "none.jsonl: No such file" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_the_papers_setting_writes_no_text_and_has_no_such_term(folder, files, tmp_path, capsys):
    args = without(train_args(folder, files, tmp_path / "p"), "--gamma")
    assert call(train, *args, "--paper") == 0
    assert "loss_keep" not in logged(tmp_path / "p")[0]
    assert not (run_folder(tmp_path / "p") / "general.jsonl").exists()
    out = capsys.readouterr().out
    assert "text by people" in out
    assert "general text" not in out


# --------------------------------------------------------------------------------------- elsewhere


def test_what_a_prompt_changes_is_compared_by_hand():
    """Two tokens of probabilities known beforehand: the head is the identity."""

    class Model:
        def head(self, h):
            return h

    p = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]).log()
    q = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]).log()
    example = Example((0, 0, 2), 2, "", False)
    got = elsewhere.compare([example], Model(), [p], Model(), [q])
    kl = 0.5 * math.log(2) + 0.25 * math.log(0.5) + 0.4 * math.log(2) + 0.6 * math.log(0.75)
    assert got["kl"] == pytest.approx(kl / 2, rel=1e-5)
    assert got["same"] == 0.5
    assert got["perplexity"] == pytest.approx((0.5 * 0.6) ** -0.5, rel=1e-5)
    assert got["perplexity_with"] == pytest.approx((0.25 * 0.8) ** -0.5, rel=1e-5)
    assert got["tokens"] == 2


def test_a_harmless_sentence_as_the_prompt_changes_what_the_sentence_changes(folder):
    llama = tiny()
    tokenizer = Tokenizer(folder)
    texts = elsewhere.texts_elsewhere(folder, tokenizer, 60)
    assert list(texts) == ["text by people"]
    assert max(len(e.ids) for e in texts["text by people"]) <= 60
    sentence = elsewhere.sentence_vectors(llama, tokenizer, folder)
    found = elsewhere.measure_elsewhere(llama, tokenizer, texts, sentence, folder)
    result = found["text by people"]
    assert result["kl"] == pytest.approx(result["sentence_kl"])
    assert result["kl"] > 0.01
    assert result["same"] == pytest.approx(result["sentence_same"])
    assert result["same"] < 1
    without_prompt = elsewhere.measure_elsewhere(llama, tokenizer, texts, None, folder)
    assert list(without_prompt["text by people"]) == ["tokens", "perplexity"]


def verdict_of(known, left, kl=0.1, retain=(0.9, 0.9, 0.0), labels=("a", "b") * 10):
    before = {"train forget": {"accuracy": known}}
    after = {"train forget": {"accuracy": left}}
    name = "train retain, another template"
    before[name] = {"accuracy": retain[0], "generic": 0.0}
    after[name] = {"accuracy": retain[1], "generic": retain[2]}
    texts = {"text by people": {"kl": kl, "sentence_kl": 0.1}}
    return " ".join(elsewhere.verdicts(before, after, texts, list(labels)))


def test_the_verdict_says_what_a_user_has_to_know():
    good = verdict_of(0.99, 0.1)
    assert good.startswith("Elsewhere this prompt changes little")
    assert "NOT FORGOTTEN: 51 % of the true answers" in verdict_of(0.99, 0.51)
    assert "DID NOT KNOW the rows to forget: 55 % right" in verdict_of(0.55, 0.1)
    changed = verdict_of(0.99, 0.1, kl=0.2)
    assert "should not be used before arbitrary queries (text by people: KL 0.20" in changed
    assert "--general FILE" in changed
    assert "DID NOT KNOW" not in verdict_of(1.0, 0.0, labels=["a"] * 20)
    assert "NOT FORGOTTEN" in verdict_of(1.0, 1.0, labels=["a"] * 20)
    refused = verdict_of(0.99, 0.1, retain=(0.9, 0.2, 0.7))
    assert "another template: 90 -> 20 % right, 70 % refused" in refused
    assert "changes little" not in refused


def test_the_verdict_says_that_rows_come_back_where_they_are_asked_otherwise():
    otherwise = "train forget, after a retain row"
    before = {"train forget": {"accuracy": 0.99}, otherwise: {"accuracy": 0.8}}
    after = {"train forget": {"accuracy": 0.1}, otherwise: {"accuracy": 0.6}}
    (line,) = elsewhere.verdicts(before, after, {}, ["a", "b"])
    assert line == (
        "ASKED OTHERWISE, rows to forget come back (train forget, after a retain row: 80 -> 60 % "
        "right)."
    )
    after[otherwise]["accuracy"] = 0.3
    assert elsewhere.verdicts(before, after, {}, ["a", "b"]) == []


def test_the_verdict_says_that_written_rows_do_not_hold():
    names = ("train forget", "train retain", "written retain, kept back")
    before = {name: {"accuracy": 0.99} for name in names}
    after = {"train forget": {"accuracy": 0.1}, "train retain": {"accuracy": 0.98}}
    after["written retain, kept back"] = {"accuracy": 0.5, "generic": 0.4}
    (line,) = elsewhere.verdicts(before, after, {}, ["a", "b"])
    assert line == (
        "WITHOUT REAL ROWS TO KEEP this prompt does not hold, so it should not be used (written "
        "retain, kept back: 99 -> 50 % right, 40 % refused). What helps: rows to keep (--retain "
        "FILE)."
    )
    after["written retain, kept back"]["accuracy"] = 0.9
    assert elsewhere.verdicts(before, after, {}, ["a", "b"]) == []


def test_a_way_in_which_the_model_hardly_answers_tells_nothing(capsys):
    before = {"train forget": {"accuracy": 0.9}}
    before["train forget, another template"] = {"accuracy": 0.4}
    before["written retain, kept back"] = {"accuracy": 0.1}
    assert [name for name in before if elsewhere.leaves_out(name, before)] == [
        "train forget, another template"
    ]
    assert "left out: without a prompt 40 % right" in capsys.readouterr().out


@pytest.mark.parametrize("raw", [False, True])
def test_of_sentences_the_second_half_is_asked_for_alone(tokenizer, raw):
    rows = [
        Row(f"Who {i}?", f"a man of {i} sons who was never at home", "", raw=raw) for i in range(9)
    ]
    words = [Row(f"Where {i}?", "here", "") for i in range(9)]
    splits = {"train forget": rows, "train retain": words, "test forget": rows}
    asked = {
        name: examples
        for name, examples, _ in elsewhere.examples_to_ask(
            splits, TEMPLATES["question"], ["unknown"], tokenizer, 200
        )
    }
    name = "train forget, half the answer given"
    assert [other for other in asked if "half" in other] == [name]
    for whole, half in zip(asked["train forget"], asked[name], strict=True):
        assert half.ids == whole.ids and half.n == (whole.n + 1) // 2
        assert half.label == tokenizer.decode(half.answer) and whole.label.endswith(half.label)


def test_rows_are_also_asked_in_a_template_that_was_not_trained():
    rows = [Row(f"text {i}", "positive", "") for i in range(150)]
    splits = {"train forget": rows, "test retain": rows}
    ways = elsewhere.ways_to_ask(splits, TEMPLATES["sentiment"], ["unknown"])
    another, third = "train forget, another template", "train forget, a third template"
    assert list(ways) == ["train forget", another, third, "test retain"]
    template, some = ways[another]
    assert len({TEMPLATES["sentiment"].string, template.string, ways[third][0].string}) == 3
    assert len(some) == elsewhere.OTHER_ROWS


def test_a_way_nobody_asked_for_is_left_out_where_the_rows_have_no_room(tokenizer, capsys):
    rows = [Row("a red film " * 30, "positive", "f:1")]
    own = Template("{text}:")
    long = Template("long " * 60 + "{text}:")
    ways = {"train forget": (own, rows), "train forget, another template": (long, rows)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elsewhere, "ways_to_ask", lambda *_: ways)
        found = list(elsewhere.examples_to_ask({"train forget": rows}, own, [], tokenizer, 40))
        assert [name for name, *_ in found] == ["train forget"]
        assert "train forget, another template: not measured: f:1" in capsys.readouterr().out
        with pytest.raises(ValueError, match="raise --max-length"):
            list(elsewhere.examples_to_ask({**ways}, own, [], tokenizer, 40))


# ------------------------------------------------------------------------------------- rehearsing


def test_a_model_rehearses_general_text_and_is_compared_with_its_base(folder, files, tmp_path):
    file = general_file(tmp_path / "general.jsonl", 60)
    args = ["--model", folder, "--data", files["forget"], "--rank", 4, "--epochs", 6,
            "--batch-size", 4, "--dtype", "fp32", "--lr", 3e-3]
    assert call(finetune, *args, "--out", tmp_path / "plain") == 0
    assert call(finetune, *args, "--general", file, "--out", tmp_path / "talks") == 0
    found = {}
    for name in ("plain", "talks"):
        info = json.loads((tmp_path / name / "run.json").read_text())
        found[name] = info["elsewhere"]
        assert (info["options"]["general"] == file) == (name == "talks")
    assert 0 < found["talks"]["general text"]["kl"] < 0.1
    assert found["plain"]["text by people"]["kl"] > 0
    assert "general text" not in found["plain"]


def test_rehearsing_is_the_divergence_from_the_base_as_it_was():
    """Also where the head learns, too: its base's is kept."""
    llama = tiny()
    texts = texts_of(3)
    teacher = finetune.Teacher(llama, texts, batch_size=2)
    assert teacher.loss(llama, random.Random(0)).item() == pytest.approx(0, abs=1e-6)

    before = [F.log_softmax(llama(torch.tensor([e.ids]))[0], dim=-1) for e in texts]
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    by_hand = 0.0
    for e, log_p in zip(texts, before):
        log_q = F.log_softmax(llama(torch.tensor([e.ids]))[0], dim=-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1)  # of each position
        by_hand += divergence[-1 - e.n : -1].sum()
    by_hand /= sum(e.n for e in texts)
    assert by_hand > 0.01
    torch.testing.assert_close(teacher.loss(llama, random.Random(0)), by_hand)
