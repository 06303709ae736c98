"""What proves the method: one claim a test, the name is the claim. Offline, on tiny models.

    python -m pytest -q

Both forward passes, model.py's and fast.py's, are compared with transformers, peft and hand
arithmetic. tests/ holds the rest: speed, files, bad input, the commands, extras/.
"""

import dataclasses
import math
import random
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import data
import eval as evaluate
import spul
import train
from data import Row, Template, collate, common_prefix, make_example, make_examples, read_rows
from fast import FastLlama
from model import Llama
from spul import Objective, SoftPrompt, answer_hidden, answer_loss, kl_loss, token_losses
from support.batches import Batches, epoch_batches
from support.options import make_parser
from support.rows import parse_row
from support.identity import fingerprint
from support.hardware import load_llama
from support.tokenizer import Tokenizer
from tests.helpers import BOTH, SHAPES, call, concatenated, logged, make_rows, phi_of, reference
from tests.helpers import small_batch, teacher_of, tiny, tokens_of, train_args, vectors

SENTIMENT = data.TEMPLATES["sentiment"]
LR = make_parser().get_default("lr")


# --------------------------------------------------------------------------------- the forward pass


@BOTH
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_the_gradient_of_phi_agree_with_transformers(kind, shape, tmp_path):
    hf = reference(shape, tmp_path)
    llama = kind.from_pretrained(tmp_path)
    tokens = tokens_of(3, 20)
    phi = vectors(5)
    with torch.no_grad():
        torch.testing.assert_close(llama(tokens), hf(tokens).logits, atol=1e-4, rtol=0)
    embeddings = torch.cat([phi.expand(3, -1, -1), hf.get_input_embeddings()(tokens)], dim=1)
    theirs = hf(inputs_embeds=embeddings).logits[:, 5:]
    for ours in (llama(tokens, llama.prefix(phi)), llama.head(llama.prompted(tokens, phi))):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
        weights /= ours.numel()
        (g,) = torch.autograd.grad((ours * weights).sum(), phi)
        (h,) = torch.autograd.grad((theirs * weights).sum(), phi, retain_graph=True)
        torch.testing.assert_close(g, h, atol=1e-5 * h.abs().max().item(), rtol=1e-3)


@BOTH
def test_bf16_logits_are_as_near_to_float32_as_those_of_transformers(kind, tmp_path):
    hf = reference("llama GQA", tmp_path)
    tokens = tokens_of(4, 40)
    with torch.no_grad():
        exact = hf(tokens).logits
        theirs = (hf.to(torch.bfloat16)(tokens).logits.float() - exact).norm() / exact.norm()
        llama = kind.from_pretrained(tmp_path, torch.bfloat16)
        ours = (llama(tokens) - exact).norm() / exact.norm()
    assert 0 < ours < 1.3 * theirs < 0.1


@BOTH
def test_smollm2_logits_agree_with_transformers(kind, smollm2):
    import transformers

    hf = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    llama = kind.from_pretrained(smollm2)
    text = "The director's last film was a triumph of light and sound over plot"
    tokens = torch.tensor([Tokenizer(smollm2).encode(text)])
    # Ordinary vectors: random ones give logits in the hundreds.
    phi = hf.get_input_embeddings().weight[1000:1030]
    with torch.no_grad():
        torch.testing.assert_close(llama(tokens), hf(tokens).logits, atol=1e-4, rtol=0)
        embeddings = torch.cat([phi[None], hf.get_input_embeddings()(tokens)], dim=1)
        theirs = hf(inputs_embeds=embeddings).logits[:, 30:]
        ours = llama(tokens, llama.prefix(phi))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


# --------------------------------------------------------------------------------------- the prefix


def with_prefix(llama, tokens, phi=None, shared_ids=()):
    return llama.hidden(tokens, llama.prefix(phi, shared_ids))


def together(llama, tokens, phi=None, shared_ids=()):
    return llama.prompted(tokens, phi, shared_ids)


WAYS = pytest.mark.parametrize("way", [with_prefix, together], ids=["prefix", "prompted"])
WINDOW = dict(model_type="mistral", sliding_window=6)


@BOTH
@WAYS
@pytest.mark.parametrize(
    "changes",
    [dict(), dict(num_key_value_heads=1), WINDOW],
    ids=["GQA", "MQA", "window shorter than the sequence"],
)
def test_the_prefix_equals_phi_concatenated_before_every_row(kind, way, changes):
    llama = tiny(kind=kind, **changes)
    tokens = tokens_of(4, 15)
    phi = vectors(5)
    ours = way(llama, tokens, phi)
    plain = concatenated(llama, tokens, phi)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    (g,), (h,) = (torch.autograd.grad(out.square().mean(), phi) for out in (ours, plain))
    assert h.abs().max() > 1e-3
    torch.testing.assert_close(g, h, atol=1e-5, rtol=1e-4)


@BOTH
@WAYS
def test_padding_on_the_right_changes_no_output_and_no_gradient(kind, way):
    llama = tiny(kind=kind)
    tokens = tokens_of(2, 9)
    phi = vectors(5)
    padded = F.pad(tokens, (0, 6), value=7)
    a = way(llama, tokens, phi)
    b = way(llama, padded, phi)[:, :9]
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    (g,), (h,) = (torch.autograd.grad(out.square().mean(), phi) for out in (a, b))
    torch.testing.assert_close(g, h, atol=1e-6, rtol=1e-4)


@BOTH
@WAYS
def test_a_prompt_of_no_vectors_is_no_prompt(kind, way):
    llama = tiny(kind=kind)
    tokens = tokens_of(2, 9)
    for none in (None, torch.zeros(0, 32)):
        assert torch.equal(way(llama, tokens, none), llama.hidden(tokens))


@BOTH
@WAYS
def test_ids_that_all_rows_share_may_be_left_to_the_prompt(kind, way):
    llama = tiny(kind=kind)
    tokens = tokens_of(3, 12)
    tokens[:, :4] = tokens[0, :4]
    shared_ids = tuple(tokens[0, :4].tolist())
    phi = vectors(5)
    for p in (phi, None):
        ours = way(llama, tokens[:, 4:], p, shared_ids)
        torch.testing.assert_close(ours, way(llama, tokens, p)[:, 4:], atol=1e-5, rtol=1e-5)


@BOTH
@WAYS
@pytest.mark.parametrize("shared_ids", [(), (5, 6, 7)], ids=["", "with shared ids"])
def test_rows_may_have_prompts_of_their_own(kind, way, shared_ids):
    """Outputs and the prompts' gradient are those of each row alone."""
    llama = tiny(kind=kind)
    tokens = tokens_of(2, 9)
    both = torch.stack([vectors(5, seed=1), vectors(5, seed=2)]).detach().requires_grad_()
    ours = way(llama, tokens, both, shared_ids)
    alone = torch.cat([way(llama, tokens[i, None], both[i], shared_ids) for i in range(2)])
    torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad(h.square().sum(), both)[0] for h in (ours, alone)]
    torch.testing.assert_close(*grads, atol=1e-2, rtol=1e-4)
    other = way(llama, tokens[:1], both[1], shared_ids)
    assert not torch.allclose(ours[:1], other, atol=1e-2)


@BOTH
@WAYS
def test_only_phi_gets_a_gradient_also_after_an_evaluation(kind, way):
    llama = tiny(kind=kind)
    tokens = tokens_of(2, 6)
    phi = vectors(3)
    for _ in range(2):
        with torch.no_grad():
            llama(tokens, llama.prefix(phi))
        phi.grad = None
        llama.head(way(llama, tokens, phi)).square().mean().backward()
        assert phi.grad.abs().min() > 0
    assert all(parameter.grad is None for parameter in llama.parameters())


@BOTH
@WAYS
def test_the_model_is_causal_after_its_prompt(kind, way):
    llama = tiny(kind=kind)
    tokens = tokens_of(1, 8)
    phi = vectors(3)
    changed = tokens.clone()
    changed[0, 5] += 1
    a, b = (way(llama, t, phi) for t in (tokens, changed))
    assert torch.equal(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:])


# --------------------------------------------------------------------------------------- generation


@BOTH
@pytest.mark.parametrize("changes", [dict(), WINDOW], ids=["full", "window"])
@pytest.mark.parametrize("p", [0, 4])
def test_generation_equals_one_row_at_a_time_without_a_cache(kind, changes, p):
    llama = tiny(kind=kind, eos_token_id=None, **changes)
    prompts = [tokens_of(3, 9)[row, :length].tolist() for row, length in enumerate([9, 2, 6])]
    prefix = llama.prefix(vectors(p)) if p else None
    got = llama.generate(prompts, prefix, max_new_tokens=7)
    for prompt, new in zip(prompts, got, strict=True):
        ids = torch.tensor([prompt])
        for _ in range(7):
            ids = torch.cat([ids, llama(ids, prefix)[:, -1:].argmax(-1)], dim=1)
        assert new == ids[0, len(prompt) :].tolist()


@BOTH
def test_generation_knows_each_rows_own_prompt(kind):
    llama = tiny(kind=kind)
    prompts = [tokens_of(2, 9)[0].tolist(), tokens_of(2, 9)[1, :6].tolist()]
    both = torch.stack([vectors(5, seed=1), vectors(5, seed=2)]).detach()
    got = llama.generate(prompts, llama.prefix(both), 6)
    alone = [llama.generate([prompts[i]], llama.prefix(both[i]), 6)[0] for i in range(2)]
    assert got == alone


@BOTH
def test_generation_takes_embeddings_in_place_of_the_prompts(kind):
    llama = tiny(kind=kind)
    prompts = tokens_of(2, 6).tolist()
    other = tokens_of(2, 6, seed=1)
    got = llama.generate(prompts, max_new_tokens=5, embeddings=llama.embed(other))
    assert got == llama.generate(other.tolist(), max_new_tokens=5)
    assert got != llama.generate(prompts, max_new_tokens=5)


@pytest.mark.parametrize("texts, n", [([], 3), ([[]], 3), ([[5], []], 3), ([[5]], 0)])
def test_generation_needs_a_token_in_every_prompt_and_one_to_write(texts, n):
    with pytest.raises(ValueError, match="needs a token in every prompt"):
        tiny().generate(texts, None, n)


@BOTH
def test_generation_ends_before_the_end_token(kind):
    llama = tiny(kind=kind, eos_token_id=None)
    prompts = tokens_of(2, 6).tolist()
    free = llama.generate(prompts, max_new_tokens=8)
    end = free[0][3]
    llama.config = dataclasses.replace(llama.config, eos_token_id=[end, 5])
    ended = llama.generate(prompts, max_new_tokens=8)
    assert ended[0] == free[0][: free[0].index(end)]


def test_tokens_are_drawn_as_often_as_they_are_likely():
    likely = torch.tensor([0.1, 0.0, 0.2, 0.7, 0.0])
    logits = likely.log().expand(4000, 5)
    generator = torch.Generator().manual_seed(0)
    drawn = Llama.sample(None, logits, 1.0, generator)
    assert drawn.shape == (4000, 1)
    share = torch.bincount(drawn[:, 0], minlength=5) / 4000
    torch.testing.assert_close(share, likely, atol=0.02, rtol=0)
    assert share[1] == share[4] == 0
    flatter = torch.bincount(Llama.sample(None, logits, 2.0, generator)[:, 0], minlength=5) / 4000
    torch.testing.assert_close(flatter, likely.sqrt() / likely.sqrt().sum(), atol=0.02, rtol=0)


@BOTH
def test_sampling_follows_its_generator_and_its_temperature(kind):
    llama = tiny(kind=kind, eos_token_id=None)
    prompts = tokens_of(1, 4).tolist()

    def draw(seed, temperature):
        generator = torch.Generator().manual_seed(seed)
        return llama.generate(prompts, None, 12, temperature, generator)

    assert draw(1, 5.0) == draw(1, 5.0) != draw(2, 5.0)
    assert draw(3, 1e-4) == llama.generate(prompts, None, 12)


@BOTH
def test_copies_are_what_a_prompt_given_as_often_has(kind):
    llama = tiny(kind=kind, eos_token_id=None)
    prompts = [tokens_of(1, 3)[0].tolist(), tokens_of(1, 7)[0].tolist()]
    prefix = llama.prefix(vectors(4))

    def draw(prompts, copies):
        generator = torch.Generator().manual_seed(0)
        return llama.generate(prompts, prefix, 6, 3.0, generator, copies=copies)

    got = draw(prompts, 3)
    assert got == draw([prompts[0]] * 3 + [prompts[1]] * 3, 1)
    assert len(set(map(tuple, got))) == 6


@BOTH
def test_what_an_edit_puts_is_what_the_text_goes_on_from(kind):
    llama = tiny(kind=kind, eos_token_id=None)
    drawn = []

    def edit(tokens):
        drawn.append(tokens.clone())
        return torch.full_like(tokens, 7) if len(drawn) == 1 else tokens

    got = llama.generate([[3, 4], [5]], None, 4, edit=edit)
    assert [new[0] for new in got] == [7, 7] != drawn[0][:, 0].tolist()
    assert [new[1:] for new in got] == llama.generate([[3, 4, 7], [5, 7]], None, 3)


# ------------------------------------------------------------------------------ where the answer is


def test_an_answer_is_the_last_tokens_of_its_example(tokenizer):
    row = Row("a fine film", "positive", "x:1")
    example, is_cut = make_example(row, tokenizer, SENTIMENT, 200)
    assert not is_cut
    assert example.ids[0] == 1  # BOS
    assert tokenizer.decode(list(example.answer)).strip() == "positive"
    assert tokenizer.decode(list(example.ids[1:])) == (
        "### Text: a fine film\n\n"
        "### Question: What is the sentiment of the given text?\n\n"
        "### Sentiment: positive"
    )


def test_both_tokenizers_give_the_answer_the_space_before_it(tokenizer, bpe_folder):
    bpe = Tokenizer(bpe_folder)
    answers = {tokenizer: tokenizer.encode("positive"), bpe: bpe.encode(" positive")}
    for tok, answer in answers.items():
        example, _ = make_example(Row("good", "positive", "x:1"), tok, Template("{text} ->"), 50)
        assert list(example.ids) == tok.bos + tok.encode("good ->") + answer
    assert tokenizer.bos == [1]
    assert bpe.bos == [0]


@pytest.mark.parametrize("completion", ["Paris", " Paris"])
def test_prompt_and_completion_are_used_as_they_are(tokenizer, bpe_folder, completion):
    fields = parse_row({"prompt": "Capital of France:", "completion": completion}, "x:1")
    row = Row(where="x:1", **fields)
    for tok in (tokenizer, Tokenizer(bpe_folder)):
        example, _ = make_example(row, tok, SENTIMENT, 50)
        joined = tok.decode(list(example.ids[len(tok.bos) :]))
        assert joined == "Capital of France:" + completion


def test_a_generic_answer_takes_the_white_space_of_the_completion_it_replaces(tokenizer):
    pairs = [(" it is so\n", " nobody\n"), ("yes", "nobody"), (" a", " nobody")]
    for completion, expected in pairs:
        row = Row("who?", completion, "", raw=True)
        example, _ = make_example(row, tokenizer, None, 99, True, "nobody")
        assert list(example.answer) == tokenizer.encode_inside(expected)
        labels = evaluate.label_set([row], tokenizer, ["nobody"], None)
        assert labels["nobody"] == list(example.answer)


def test_a_long_text_loses_its_end_and_neither_template_nor_answer(tokenizer):
    row = Row(" ".join(f"{i}st" for i in range(500)), "positive", "x:1")
    example, is_cut = make_example(row, tokenizer, SENTIMENT, 64)
    before, after = SENTIMENT.string.split("{text}")
    text = tokenizer.decode(list(example.ids[1:]))
    assert is_cut
    assert 60 <= len(example.ids) <= 64
    assert text.startswith(before + "0st 1st")
    assert text.endswith(after + " positive")


def test_an_answer_longer_than_the_limit_is_refused(tokenizer):
    with pytest.raises(ValueError, match="x:7: template and answer alone.*--max-length"):
        make_example(Row("a", "no " * 100, "x:7"), tokenizer, Template("{text}:"), 64)


def test_an_example_knows_which_of_its_tokens_are_the_texts_own(tokenizer, bpe_folder):
    row = Row("a film by john smith", "positive", "f:1")
    for tok in (tokenizer, Tokenizer(bpe_folder)):
        e, _ = make_example(row, tok, SENTIMENT, 512)
        first, last = e.text
        assert tok.decode(list(e.ids[first:last])).strip() == row.text
        assert tok.decode(list(e.ids[:first])).strip() == "### Text:"
        rest = tok.decode(list(e.ids[last:])).strip()
        assert rest.startswith("### Question: What is the sentiment")
        batch = collate([e, e], shared_ids=e.ids[:3])
        assert tok.decode(batch.tokens[1][batch.is_text[1]].tolist()).strip() == row.text
        e, _ = make_example(Row("say it", " no", "f:1", raw=True), tok, None, 512)
        assert e.text == (len(tok.bos), len(e.ids) - e.n)


# ------------------------------------------------------------------------------------------ batches


def some_examples(n_f, n_r, seed=0):
    rng = random.Random(seed)
    examples = []
    for i in range(n_f + n_r):
        examples.append(data.Example(tuple(range(rng.randint(4, 60))), 1, "a", i < n_f))
    return examples


def test_a_batch_knows_which_position_predicts_which_answer_token():
    examples = [data.Example((5, 6, 7, 8), 2, "a", True), data.Example((9, 4), 1, "b", False)]
    batch = collate(examples)
    assert batch.tokens.tolist() == [[5, 6, 7], [9, 0, 0]]
    assert batch.rows.tolist() == [0, 0, 1]
    assert batch.columns.tolist() == [1, 2, 0]
    assert batch.targets.tolist() == [7, 8, 4]
    assert batch.forget.tolist() == [True, True, False]
    assert (batch.n_f, batch.n_r) == (1, 1)


def test_the_common_prefix_ends_before_the_first_position_that_predicts_an_answer():
    def common(*rows):
        return data.common_prefix([data.Example(tuple(ids), n, "", False) for ids, n in rows])

    assert common(([1, 2, 3, 4], 1), ([1, 2, 5, 4], 1)) == (1, 2)
    assert common(([1, 2, 3, 4], 1), ([1, 2, 3], 1)) == (1,)  # 2 predicts 3
    assert common(([1, 2, 3, 4], 2)) == (1,)
    assert common(([1, 2, 3], 1), ([9, 2, 3], 1)) == ()


def test_an_epoch_shows_every_row_once_in_batches_of_similar_length():
    examples = some_examples(30, 700)
    batches = epoch_batches(examples, 16, seed=1, epoch=0)
    assert sorted(i for batch in batches for i in batch) == list(range(730))

    def spread(batches):
        lengths = [[len(examples[i].ids) for i in batch] for batch in batches]
        return sum(max(of_batch) - min(of_batch) for of_batch in lengths) / len(batches)

    in_file_order = [list(range(s, s + 16)) for s in range(0, 700, 16)]
    assert spread(batches) < 5 < 40 < spread(in_file_order)


def test_the_order_follows_the_seed_and_the_epoch():
    examples = some_examples(5, 100)
    order = epoch_batches(examples, 8, 1, 0)
    assert order == epoch_batches(examples, 8, 1, 0)
    assert order != epoch_batches(examples, 8, 1, 1) != epoch_batches(examples, 8, 2, 1)


def test_forget_per_batch_fills_every_batch_and_passes_once_over_the_retain_rows():
    examples = some_examples(10, 101)
    batches = epoch_batches(examples, 8, 0, 0, forget_per_batch=3)
    assert len(batches) == math.ceil(101 / 5)
    assert all(sum(examples[i].forget for i in batch) == 3 for batch in batches)
    assert sorted(i for batch in batches for i in batch if i >= 10) == list(range(10, 111))
    counts = [sum(batch.count(i) for batch in batches) for i in range(10)]
    assert max(counts) - min(counts) <= 1


# --------------------------------------------------------------------------------------- the prompt


@pytest.mark.parametrize("d, count", [(4096, 1_192_192), (2048, 604_416), (5120, 1_486_080)])
def test_the_encoder_has_the_papers_number_of_parameters(d, count):
    assert sum(p.numel() for p in SoftPrompt(30, d).parameters()) == count


def test_the_encoder_computes_its_formula():
    prompt = SoftPrompt(5, 12, hidden=7)
    linear = [m for m in prompt.mlp if isinstance(m, torch.nn.Linear)]
    (w1, b1), (w2, b2), (w3, b3) = ((m.weight, m.bias) for m in linear)
    by_hand = ((prompt.E @ w1.T + b1).clamp(min=0) @ w2.T + b2).clamp(min=0) @ w3.T + b3
    torch.testing.assert_close(prompt(), by_hand)


def test_free_vectors_are_themselves():
    prompt = SoftPrompt(5, 12, hidden=0)
    assert torch.equal(prompt(), prompt.E)
    assert sum(p.numel() for p in prompt.parameters()) == 60


# --------------------------------------------------------------------------------------- the losses

# Two rows; the first has two answer tokens, the second one; V = 3.
LOGITS = [[0.0, math.log(2), math.log(5)], [math.log(3), 0.0, 0.0], [0.0, 0.0, math.log(2)]]
P = [[1 / 8, 2 / 8, 5 / 8], [3 / 5, 1 / 5, 1 / 5], [1 / 4, 1 / 4, 1 / 2]]  # their softmax
TARGETS = [2, 1, 0]


def test_the_cross_entropy_is_summed_over_a_rows_answer_and_averaged_over_rows():
    by_hand = (-math.log(5 / 8) - math.log(1 / 5) - math.log(1 / 4)) / 2
    losses = token_losses(torch.tensor(LOGITS), torch.tensor(TARGETS))
    got = answer_loss(losses, 2).item()
    assert got == pytest.approx(by_hand, rel=1e-6)


def test_the_kl_divergence_is_of_the_teacher_from_the_prompted_model():
    teacher = [[math.log(4), 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, math.log(2)]]
    q = [[4 / 6, 1 / 6, 1 / 6], [1 / 3, 1 / 3, 1 / 3], [1 / 4, 1 / 4, 1 / 2]]
    by_hand = sum(t * math.log(t / s) for ts, ss in zip(q, P) for t, s in zip(ts, ss)) / 2
    got = kl_loss(torch.tensor(LOGITS), torch.tensor(teacher), 2).item()
    assert by_hand > 0.1
    assert got == pytest.approx(by_hand, rel=1e-6)
    same = kl_loss(torch.tensor(LOGITS), torch.tensor(LOGITS), 2).item()
    assert same == pytest.approx(0, abs=1e-6)


def test_the_loss_is_the_weighted_sum():
    assert Objective(alpha=0.5, beta=0.1).total(2.0, 3.0, 5.0) == 2.0 + 1.5 + 0.5


def test_the_default_weights_keep_more_than_the_papers():
    assert Objective() == Objective(alpha=3.0, beta=0.5, kl_position="aligned", gamma=8.0)


def test_losses_of_bf16_logits_are_computed_in_float32():
    logits = torch.tensor(LOGITS).bfloat16()
    assert answer_loss(token_losses(logits, torch.tensor(TARGETS)), 2).dtype == torch.float32
    assert kl_loss(logits, logits.flip(1), 2).dtype == torch.float32


@BOTH
@pytest.mark.parametrize("position", ["aligned", "after-label"])
def test_the_losses_of_a_batch_equal_those_of_whole_rows_one_at_a_time(kind, position):
    """The plain way: prompt before each row, logits everywhere, a loop over answer tokens."""
    llama = tiny(kind=kind)
    prompt = SoftPrompt(4, 32, 8)
    examples = small_batch(2, 3)
    shift = int(position == "after-label")
    if shift:  # the last position of a row is needed, too
        examples = [dataclasses.replace(e, ids=e.ids + (9,)) for e in examples]
    teacher = teacher_of(llama, examples, shift)
    batch = collate(examples, keep_last=shift)
    got = train.losses(llama, prompt, batch, teacher, Objective(0.7, 0.3, position))
    of_forget = []
    of_retain = []
    divergences = []
    for e in examples:
        ids = torch.tensor([e.ids])
        log_q = F.log_softmax(llama.head(concatenated(llama, ids, prompt())), -1)[0]
        log_p = F.log_softmax(llama(ids), -1)[0]
        spots = range(len(e.ids) - e.n, len(e.ids))
        loss = sum(-log_q[t - 1, e.ids[t]] for t in spots)
        (of_forget if e.forget else of_retain).append(loss)
        if not e.forget:
            at = [t - 1 + shift for t in spots]
            divergences.append((log_p[at].exp() * (log_p[at] - log_q[at])).sum())
    by_hand = {
        "loss_f": sum(of_forget) / 2,
        "loss_r": sum(of_retain) / 3,
        "loss_kl": sum(divergences) / 3,
    }
    by_hand["loss"] = by_hand["loss_f"] + 0.7 * by_hand["loss_r"] + 0.3 * by_hand["loss_kl"]
    for name, value in by_hand.items():
        torch.testing.assert_close(got[name], value, atol=2e-4, rtol=1e-4)


@BOTH
@pytest.mark.parametrize(
    "n_f, n_r, zero",
    [(3, 0, ["loss_r", "loss_kl"]), (0, 3, ["loss_f"])],
    ids=["no retain rows", "no forget rows"],
)
@pytest.mark.parametrize("position", ["aligned", "after-label"])
def test_a_batch_without_rows_of_one_side_trains_on_the_other(kind, n_f, n_r, zero, position):
    llama = tiny(kind=kind)
    prompt = SoftPrompt(4, 32, 8)
    examples = small_batch(n_f, n_r)
    teacher = teacher_of(llama, examples) if n_r else llama.embed_tokens.weight[:0]
    before = prompt().detach().clone()
    optimizer = train.make_optimizer(prompt, 0.01)
    batch = collate(examples, keep_last=True)
    objective = Objective(kl_position=position)
    report = train.train_step(llama, prompt, optimizer, batch, teacher, objective)
    assert all(report[name] == 0 for name in zero)
    assert report["grad_norm"] > 0
    assert not torch.equal(prompt(), before)


# ------------------------------------------------------------------------------------- the training


def test_the_learning_rate_rises_over_a_tenth_and_falls_to_nothing():
    rates = [train.learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates[0] == 0.2
    assert rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[99] < 0.001


@BOTH
def test_train_step_does_what_the_command_does(kind, folder, files, tmp_path):
    plain = ["--plain"] if kind is Llama else []
    assert call(train, *train_args(folder, files, tmp_path / "p", *plain)) == 0
    llama = kind.from_pretrained(folder)
    tok = Tokenizer(folder)
    generic = ["unknown"]
    rng = random.Random("generic 0")
    rows = read_rows(files["forget"])
    forget, _ = make_examples(rows, tok, SENTIMENT, 508, True, generic, rng)
    retain, _ = make_examples(read_rows(files["retain"]), tok, SENTIMENT, 508)
    examples = forget + retain
    hidden = answer_hidden(llama, retain)
    torch.manual_seed(0)
    prompt = SoftPrompt(4, 32, 8)
    optimizer = train.make_optimizer(prompt, LR)
    batches = Batches(examples, 1, 2, 8, 0, "loss")
    for step in range(len(batches)):
        _, indices, weights = batches.batch(step)
        optimizer.param_groups[0]["lr"] = train.learning_rate(step, len(batches), LR)
        teacher = torch.cat([hidden[i - len(forget)] for i in indices if i >= len(forget)])
        rows = [examples[i] for i in indices]
        batch = collate(rows, "cpu", common_prefix(rows), weights=weights)
        report = train.train_step(llama, prompt, optimizer, batch, teacher)
        batches.tell(indices, report["rows"])
    torch.testing.assert_close(prompt().detach(), phi_of(tmp_path / "p"), atol=1e-6, rtol=1e-5)


def test_the_log_has_a_line_for_each_step_with_every_loss_term(trained):
    lines = logged(trained)
    assert [line["step"] for line in lines] == list(range(1, 15))
    assert lines[-1]["epoch"] == 2
    names = "step epoch lr loss loss_f loss_r loss_kl rows n_f n_r grad_norm seconds"
    for line in lines:
        assert set(line) == set(names.split())
        assert len(line["rows"]) == line["n_f"] + line["n_r"]
        total = line["loss_f"] + 3 * line["loss_r"] + 0.5 * line["loss_kl"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    first, second = lines[:7], lines[7:]
    assert sum(line["n_f"] for line in first) == 12
    assert sum(line["n_r"] for line in first) == 40
    # few rows to forget: from then on half of each batch of 7 or 8
    assert all(line["n_f"] == (line["n_f"] + line["n_r"]) // 2 for line in second)
    assert sum(line["n_f"] + line["n_r"] for line in second) == 52


# ------------------------------------------------------------------------------ the prompt's folder


def test_peft_loads_the_prompt_folder_and_gives_the_same_logits(folder, trained):
    import peft
    import transformers

    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(hf, trained)
    llama = Llama.from_pretrained(folder)
    tokens = tokens_of(3, 14)
    phi, _ = spul.load_prompt(trained, folder)
    with torch.no_grad():
        ours = llama(tokens, llama.prefix(phi))
        expected = theirs(input_ids=tokens).logits[:, 4:]
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
        assert not torch.allclose(ours, llama(tokens), atol=0.1)


def test_a_saved_prompt_comes_back_bit_for_bit(tmp_path):
    phi = vectors(6).detach()
    info = {"model": "m", "base_sha256": "x", "template": None, "generic": []}
    spul.save_prompt(tmp_path, phi, tiny().config, info)
    again, found = spul.load_prompt(tmp_path)
    assert torch.equal(again, phi)
    assert (found["p"], found["d"], found["model"]) == (6, 32, "m")


def test_the_fingerprint_tells_models_apart_and_not_copies(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    first = fingerprint(folder)
    assert fingerprint(tmp_path / "copy") == first
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] *= 1.01  # one of many, same header, same size
    save_file(tensors, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    assert fingerprint(tmp_path / "copy") != first


# ------------------------------------------------------------------------------------- the measures


def test_weighted_f1_equals_hand_arithmetic():
    # a: precision 2/2, recall 2/3; b: precision 1/2, recall 1/2
    got = evaluate.weighted_f1(list("aaabb"), list("aabxb"))
    assert got == pytest.approx(0.6 * 0.8 + 0.4 * 0.5)
    constant = evaluate.weighted_f1(list("aaab"), list("aaaa"))
    assert constant == pytest.approx(2 * 0.75**2 / 1.75)


def test_rouge_l_is_the_recall_of_the_longest_common_subsequence():
    # the cat on mat
    got = evaluate.rouge_l("The cat sat on the mat.", "the cat is on a mat")
    assert got == pytest.approx(4 / 6)
    assert evaluate.rouge_l("mat a on", "on a mat") == pytest.approx(1 / 3)
    assert evaluate.rouge_l("", "one") == 0
    assert evaluate.rouge_l("one two three", "two") == 1


@BOTH
def test_measures_equal_those_of_generated_answers(kind, folder, tokenizer):
    llama = kind.from_pretrained(folder)
    phi = vectors(4).detach()
    prefix = llama.prefix(phi)
    rows = [Row(r["text"], r["label"], "") for r in make_rows(30, ["a", "b"], 1)]
    examples, _ = make_examples(rows, tokenizer, Template("{text}"), 64)
    # The answers that this random model really gives, some of two tokens, are the label set.
    greedy = llama.generate([e.prompt for e in examples], prefix, 2)
    labels = {"long": greedy[0], "short": greedy[1][:1], "never": [3, 4]}
    truth = ["never", "short", "never", *["short", "long", "never"] * 9]
    for i, label in enumerate(truth):
        ids = labels[label]
        new = examples[i].prompt + tuple(ids)
        examples[i] = dataclasses.replace(examples[i], ids=new, n=len(ids), label=label)
    answers = []
    for ids in greedy:
        fitting = [name for name, own in labels.items() if ids[: len(own)] == own]
        answers.append(max(fitting, default=None, key=lambda name: len(labels[name])))
    assert answers[:2] == ["long", "short"]
    result = evaluate.measure(llama, tokenizer, examples, labels, ["short"], phi)
    assert result["accuracy"] == sum(a == t for a, t in zip(answers, truth)) / 30 > 0
    assert result["generic"] == answers.count("short") / 30 > 0
    assert result["outside"] == sum(a in (None, "short") for a in answers) / 30
    assert result["f1"] == pytest.approx(evaluate.weighted_f1(truth, answers))
    chances = []
    for e in examples:
        log_p = F.log_softmax(llama(torch.tensor([e.ids]), prefix)[0], -1)
        spots = range(len(e.ids) - e.n, len(e.ids))
        chances.append(math.exp(sum(log_p[t - 1, e.ids[t]].item() for t in spots)))
    assert result["probability"] == pytest.approx(sum(chances) / 30, rel=1e-4)


def test_an_answer_that_begins_another_is_told_from_it():
    llama = tiny(eos_token_id=None)
    prompt = tuple(tokens_of(1, 6)[0].tolist())
    first, second = llama.generate([prompt], None, 2)[0]
    example = data.Example((*prompt, first), 1, "1", False)
    scores = evaluate.score(llama, answer_hidden(llama, [example]), [example])
    assert scores[0][0]
    answers = {"1": [first], "10": [first, second]}
    generate = evaluate.generator(llama)
    assert evaluate.predict(None, [example], scores, answers, generate) == ["10"]


def test_the_trained_prompt_is_measured_alike_on_both_forward_passes(folder, files, trained):
    tok = Tokenizer(folder)
    rows = read_rows(files["retain"])
    examples, _ = make_examples(rows, tok, SENTIMENT, 508)
    labels = evaluate.label_set(rows, tok, ["neutral", "unknown"], SENTIMENT)
    phi, _ = spul.load_prompt(trained)
    found = []
    for plain in (True, False):
        llama = load_llama(folder, torch.float32, "cpu", plain)
        assert isinstance(llama, FastLlama) != plain
        found.append(evaluate.measure(llama, tok, examples, labels, ["neutral"], phi))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
