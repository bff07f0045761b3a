"""Ordinary language modelling of the same text, beside compression.

Hyperpretraining alone makes a small model forget how to read its whole context; the text that a step
compresses is there anyway, and can be read once more as it is. (The paper's C is large enough without.)
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from data import Batch, Term
from llama import InputError, int_tensor
from run import option
from tasks.hyperpretrain import words_of

OPTIONS = {"lm": option(0.0, help="hyperpretrain: weight of ordinary language modelling on the same text")}


def check(args) -> None:
    if args.task != "hyperpretrain":
        raise InputError("--lm belongs to --task hyperpretrain")


def terms(run, terms: list[Term]) -> list[Term]:
    if not run.args.lm:
        return terms

    vocab = run.hyper.model.config.vocab

    def loss(hyper, batch: Batch, gists, logits) -> Tensor:
        text = whole_text(batch, vocab)
        logits, _ = hyper(text)
        return cross_entropy(logits.float(), text.targets, reduction="sum")

    return [*terms, Term(run.args.lm, lambda batch: len(whole_text(batch, vocab).targets), loss, "lm")]


def whole_text(batch: Batch, vocab: int) -> Batch:
    """BOS A B C D as rows without anything to compress. Contexts are BOS A D and gists, targets B C."""
    words = words_of(batch.context[0], vocab)
    B, T = words.shape
    bos, a, d = words.split([1, (T - 1) // 2, (T - 1) // 2], dim=1)
    text = torch.cat((a, batch.targets.view(B, -1), d), dim=1)
    tokens = torch.cat((bos, text[:, :-1]), dim=1)
    select = torch.arange(tokens.numel(), device=tokens.device)
    return Batch(None, int_tensor(range(B), tokens.device), tokens, select, text.flatten(), tokens.numel())
