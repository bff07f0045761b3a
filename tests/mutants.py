"""Mutation tests: each one-line mistake below must make one of the tests beside it fail.

    python -m tests.mutants            all of them: under three minutes on two cores
    python -m tests.mutants NAME …     those whose name contains a NAME
    python -m tests.mutants --list     their names

Each mutant is made and tested in a temporary copy of the project. Exit status 1 if one survives; 2 if one
can't be made, because its old text doesn't occur exactly once, or if its tests fail without it.
"""

import argparse
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
AT_ONCE = 2  # each with one thread
LIMIT = 300  # seconds, for the tests of a mutant
PROCESSES = multiprocessing.get_context("forkserver")
# What the tests need and no more: pytest starts three times as fast.
PYTEST = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception", "--assert=plain"]
LIBRARIES = ["pytest", "sentencepiece", "safetensors.torch", "tqdm"]
LIBRARIES += ["torch._dynamo", "torch.distributed.checkpoint.state_dict"]  # of optimizers, of their state


class Mutant(NamedTuple):
    name: str
    file: str
    tests: Sequence[str]  # without "tests/test_"
    old: str  # occurs exactly once in the file
    new: str


BATCH = "equivalence.py::test_a_training_batch_has_the_logits_and_the_gradients_of_the_joint_pass"
PLAIN_BATCH = "equivalence.py::test_a_batch_without_gists_has_the_loss_of_plain_rows"
STEP = "equivalence.py::test_the_loss_of_a_step_is_the_sum_over_its_target_tokens_divided_by_their_number"
PROCESSES_AGREE = "train.py::test_losses_depend_neither_on_processes_nor_on_accumulation[emit]"
RESUMED = "train.py::test_a_full_disk_leaves_the_last_state"
EACH_ROW = "equivalence.py::test_a_run_reads_each_row_once"
WAY = "equivalence.py::test_every_way_to_make_a_prefix_has_the_logits_and_the_gradients_of_one_row"
DEFINITION = "data.py::test_a_definition_stands_in_a_training_row_where_its_method_reads_it"
EVERY_KIND = "train.py::test_every_kind_of_run_trains_all_its_tensors_and_evaluates_the_same_later"
RANKED = "equivalence.py::test_every_column_answers_with_the_choice_that_one_row_holds_most_likely"
WRITTEN = "equivalence.py::test_every_column_writes_what_greedy_decoding_in_one_row_writes"
SETS = "equivalence.py::test_several_sets_of_examples_answer_like_sets_combined_by_hand"
KNOWN = "equivalence.py::test_a_score_that_is_known_is_that_of_the_same_tokens_and_the_same_weights"
JOINT = "equivalence.py::test_the_joint_pass_is_a_llama_whose_queries_see_gists_alone"
LLAMA = "equivalence.py::test_the_plain_model_is_a_llama"
CHECKSUM = "equivalence.py::test_a_checksum_tells_every_tensor"
QUANTIZED = "equivalence.py::test_a_quantized_matrix_is_levels_times_the_scale_of_their_block"
HELD_OUT = "equivalence.py::test_no_held_out_task_of_the_miniature_is_trained_on"
HELD_OUT_BY_NAME = "equivalence.py::test_held_out_datasets_are_told_by_name_where_no_lists_say_which"
APART = "equivalence.py::test_the_log_tells_the_loss_of_labels_from_that_of_their_ends"
LENGTHS = "tasks.py::test_a_steps_contexts_have_one_length_that_is_drawn_between_the_shortest_and_the_longest"
DRAWN = "tasks.py::test_a_step_draws_how_many_of_the_gists_it_has"
STRETCHES = "tasks.py::test_text_is_compressed_in_stretches_where_tasks_have_examples"
OWN_EXAMPLES = "equivalence.py::test_no_query_is_among_its_own_examples"
MASK = "gist.py::test_the_mask_of_a_small_row_is_what_the_paper_draws"
NUMBERS = "data.py::test_a_row_depends_on_the_seed_and_its_number_alone"
OTHER = "eval.py::test_another_task_is_one_of_another_dataset"
LM = "gist.py::test_language_modelling_reads_the_whole_text_as_it_is"
PIECES = "llama.py::test_reading_in_pieces_equals_reading_at_once"

MUTANTS = [
    # ---------------------------------------------------------------------------------------- positions
    Mutant("compress: offset + 1", "gist.py", [BATCH],
        "amax(1) + 1", "amax(1) + 2"),
    Mutant("compress: offset - 1", "gist.py", [BATCH],
        "amax(1) + 1", "amax(1)"),
    Mutant("prefix: offset + 1", "gist.py", [BATCH],
        '"offset": self.offset, "mask"', '"offset": self.offset + 1, "mask"'),
    Mutant("prefix: offset - 1", "gist.py", [BATCH],
        '"offset": self.offset, "mask"', '"offset": self.offset - 1, "mask"'),
    Mutant("joint pass: query one position late", "gist.py", [JOINT],
        "offset=positions, adapter=adapter",
        "offset=positions_of(tokens) + after[..., 0].long(), adapter=adapter"),
    Mutant("joint pass: query one position early", "gist.py", [JOINT],
        "offset=positions, adapter=adapter",
        "offset=positions_of(tokens) - after[..., 0].long(), adapter=adapter"),
    Mutant("joint pass without its positions", "gist.py", [f"{WAY}[spread]"],
        "offset=positions, adapter=adapter", "offset=None, adapter=adapter"),
    Mutant("ranking: offset + 1", "eval.py", [RANKED],
        'positions += past["offset"][:, None]', 'positions += past["offset"][:, None] + 1'),
    Mutant("ranking: offset - 1", "eval.py", [RANKED],
        'positions += past["offset"][:, None]', 'positions += past["offset"][:, None] - 1'),
    Mutant("generation: prompt one position late", "llama.py", [WRITTEN],
        "tokens, past=past, offset=offset,",
        "tokens, past=past, offset=offset if n or offset is None else offset + 1,"),
    Mutant("generation: prompt one position early", "llama.py", [WRITTEN],
        "tokens, past=past, offset=offset,",
        "tokens, past=past, offset=offset if n or offset is None else offset - 1,"),
    Mutant("generation: answer one position late", "llama.py", [WRITTEN],
        "offset = position + n\n", "offset = position + n + 1\n"),
    Mutant("generation: answer one position early", "llama.py", [WRITTEN],
        "offset = position + n\n", "offset = position + n - 1\n"),
    Mutant("generation: answer after the padding", "llama.py", [WRITTEN],
        "else offset + lengths", "else offset + T"),
    Mutant("generation: goes on from the padding", "llama.py", [WRITTEN],
        "* T + lengths - 1", "* T + T - 1"),
    Mutant("gists one position late", "gist.py", [BATCH],
        "list(range(G - T, G)), list(range(T - G, T))",
        "list(range(G - T + 1, G + 1)), list(range(T - G, T))"),
    Mutant("examples one position early", "gist.py", [BATCH],
        "list(range(G - T, G)), list(range(T - G, T))",
        "[*range(G - T - 1, -1), *range(G)], list(range(T - G, T))"),
    Mutant("kept one token early", "gist.py", [BATCH],
        "list(range(G - T, G)), list(range(T - G, T))",
        "list(range(G - T, G)), list(range(T - G - 1, T - 1))"),
    Mutant("gists one token early", "gist.py", [BATCH],
        "keys_values(x, rows.kept,", "keys_values(x, rows.kept - 1,"),
    Mutant("gists one token early in the last layer", "llama.py", [BATCH],
        "layer.forward_at, x, index, *inputs",
        "layer.forward_at, x, (index[0], index[1] - 1), *inputs"),
    Mutant("average of unequal positions", "gist.py", [f"{SETS}[None-average]"],
        "[hyper.compress(rows) for rows in pieces]",
        "[hyper.compress(replace(rows, positions=positions_of(rows.tokens))) for rows in pieces]"),
    Mutant("sets side by side without a shift", "further/chain.py", [f"{SETS}[None-concat]"],
        "if joined else len(row.kept)", "if joined else 0"),
    Mutant("sets of a chain without a shift", "further/chain.py", [f"{SETS}[None-chain]"],
        "len(row.tokens) if joined else len(row.kept)", "len(row.kept)"),
    Mutant("sets of a chain don't see those before", "further/chain.py", [f"{SETS}[None-chain]"],
        'hyper.compress(rows, before["past"], before["mask"])', "hyper.compress(rows)"),
    Mutant("anchors of a chain see what isn't real", "further/chain.py", [f"{WAY}[anchors chain]"],
        'before["past"], before["mask"])', 'before["past"])'),
    Mutant("anchors side by side: padding counts", "further/chain.py", [f"{WAY}[anchors concat]"],
        "torch.cat([real(gists), real(more)], dim=1)", "None"),
    Mutant("spread: gists one position late", "further/spread.py", [f"{WAY}[spread]"],
        "(T * (g + 1) // G - 1 for g in range(G))", "(T * (g + 1) // G for g in range(G))"),
    Mutant("spread: gists one position early", "further/spread.py", [f"{WAY}[spread]"],
        "(T * (g + 1) // G - 1 for g in range(G))", "(T * (g + 1) // G - 2 for g in range(G))"),
    Mutant("all gists have one embedding", "gist.py", [JOINT],
        "(tokens - V).clamp(min=0)", "(tokens - V).clamp(min=0, max=0)"),
    # ------------------------------------------------------------------------------ who acts, and where
    Mutant("compress without its LoRA set", "gist.py", [BATCH],
        "self.hyper_adapter, past, mask", "None, past, mask"),
    Mutant("training: hypernetwork's set left on", "gist.py", [BATCH],
        "as_past(batch.tokens.shape[1], self.downstream_adapter)",
        "as_past(batch.tokens.shape[1], self.hyper_adapter)"),
    Mutant("joint pass: hypernetwork's set left on", "gist.py", [JOINT],
        "{self.hyper_adapter: ~after,", "{self.hyper_adapter: ~after | after,"),
    Mutant("evaluation: hypernetwork's set left on", "eval.py", [RANKED],
        "adapter = run.hyper.downstream_adapter if column.trained else None\n    answers",
        "adapter = run.hyper.hyper_adapter if column.trained else None\n    answers"),
    Mutant("ranking: hypernetwork's set left on", "eval.py", [RANKED],
        "batch, own, before, adapter, mean)",
        "batch, own, before, run.hyper.hyper_adapter, mean)"),
    Mutant("generation: hypernetwork's set left on", "eval.py", [WRITTEN],
        "episodes[part[0]], batch, before, adapter)",
        "episodes[part[0]], batch, before, run.hyper.hyper_adapter)"),
    Mutant("generation: set dropped after a token", "llama.py", [f"{WRITTEN}[downstream]"],
        "adapter=adapter, mask=mask, select=select)",
        "adapter=None if n else adapter, mask=mask, select=select)"),
    Mutant("baselines answered by the trained set", "eval.py", [f"{RANKED}[downstream-sum]"],
        "adapter = run.hyper.downstream_adapter if column.trained else None\n    answers",
        "adapter = run.hyper.downstream_adapter\n    answers"),
    Mutant("few-shot examples read by the base", "eval.py", [f"{RANKED}[downstream-sum]"],
        "[row for (row,) in contexts], adapter)", "[row for (row,) in contexts])"),
    Mutant("mean-pooled examples read by the set", "eval.py", [f"{WRITTEN}[downstream]"],
        "mean_pooled(read(run, contexts, None),", "mean_pooled(read(run, contexts, adapter),"),
    Mutant("mean pooling of rotated keys", "gist.py", [f"{RANKED}[None-sum]"],
        "back = rotary_angles(-positions, config)", "back = rotary_angles(0 * positions, config)"),
    Mutant("mean-pooled keys not where gists stand", "gist.py", [f"{RANKED}[None-sum]"],
        "forth = rotary_angles(positions[:, :most], config)",
        "forth = rotary_angles(positions[:, :most] + 1, config)"),
    Mutant("label anchors a token early", "gist.py", [f"{RANKED}[None-sum]"],
        "        last = len(tokens) - 1\n", "        last = len(tokens) - 2\n"),
    Mutant("label anchors read by the trained set", "eval.py", [f"{RANKED}[downstream-sum]"],
        'Column("label anchors", anchor_context, read, trained=False)',
        'Column("label anchors", anchor_context, read)'),
    Mutant("the base's columns scored by C", "eval.py", [f"{RANKED}[None-sum]"],
        '''for each query of task number t: whether the best choice is right, or ROUGE-L."""
    run = run.base if column.base else run''',
        '''for each query of task number t: whether the best choice is right, or ROUGE-L."""
    run = run.base if False else run'''),
    Mutant("one key for C and its base", "eval.py", [KNOWN],
        '''and the weights that read them."""
    run = run.base if column.base else run''',
        '''and the weights that read them."""
    run = run'''),
    Mutant("a length of context for each row", "tasks/hyperpretrain.py", [LENGTHS],
        "{seed} step {number // self.rows}", "{seed} step {number}"),
    Mutant("a number of gists for each row", "tasks/hyperpretrain.py", [DRAWN],
        "** of_step.random()", "** random.Random(number).random()"),
    Mutant("the last of the gists in place of the first", "tasks/hyperpretrain.py", [DRAWN],
        "self.gist_ids[:gists]", "self.gist_ids[-gists:]"),
    Mutant("stretches of text that overlap", "tasks/hyperpretrain.py", [f"{STRETCHES}[gists_every]"],
        "zip(cuts, cuts[1:]) if a < b]", "zip(cuts, cuts[2:]) if a < b]"),
    Mutant("losses of labels and ends mixed up", "train.py", [APART],
        '(("label", False), ("end", True))',
        '(("label", True), ("end", False))'),
    Mutant("LoRA applied twice", "llama.py", [LLAMA],
        "y = y + self.lora[name](x, gate)", "y = y + 2 * self.lora[name](x, gate)"),
    Mutant("LoRA always on, as if merged", "llama.py", [LLAMA],
        "adapter.items():", "(dict.fromkeys(self.lora) | dict(adapter)).items():"),
    Mutant("LoRA's scale is alpha", "lora.py", [LLAMA],
        "self.scale = alpha / rank", "self.scale = alpha"),
    Mutant("no gradient through the prefix's values", "gist.py", [BATCH],
        "return Gists(kept, rows.offset,",
        "return Gists([(k, v.detach()) for k, v in kept], rows.offset,"),
    # -------------------------------------------------------------------------------------------- masks
    Mutant("gist mask: the next token is seen", "gist.py", [MASK],
        "device=is_gist.device).tril()", "device=is_gist.device).tril(1)"),
    Mutant("gist mask: no token sees itself", "gist.py", [MASK],
        "device=is_gist.device).tril()", "device=is_gist.device).tril(-1)"),
    Mutant("gist mask: the last example token is seen", "gist.py", [JOINT],
        "(is_gist[:, None, :] |", "((is_gist | is_gist.roll(-1, 1))[:, None, :] |"),
    Mutant("gist mask: gists are hidden", "gist.py", [JOINT],
        "(is_gist[:, None, :] |", "((is_gist & False)[:, None, :] |"),
    Mutant("gists among the examples without the mask", "further/among.py", [f"{WAY}[among]"],
        "hyper.compress(rows, mask=gist_mask(rows.tokens >= hyper.model.config.vocab))",
        "hyper.compress(rows)"),
    Mutant("mask after a past: the next token is seen", "llama.py", [RANKED],
        "device=past_mask.device).tril()", "device=past_mask.device).tril(1)"),
    Mutant("mask after a past: no token sees itself", "llama.py", [RANKED],
        "device=past_mask.device).tril()", "device=past_mask.device).tril(-1)"),
    Mutant("causal mask: the next token is seen", "llama.py", [PIECES],
        ".tril(S - T)", ".tril(S - T + 1)"),
    Mutant("causal mask: no token sees itself", "llama.py", [PIECES],
        ".tril(S - T)", ".tril(S - T - 1)"),
    Mutant("gists see one token further", "llama.py", [BATCH],
        "mask = key_positions <= index", "mask = key_positions - 1 <= index"),
    Mutant("fusion: padding of instructions is seen", "gist.py", [f"{WAY}[fusion]"],
        "return Gists(kept, rows.offset, rows.past_mask)", "return Gists(kept, rows.offset)"),
    Mutant("fusion: the instruction's last token is lost", "further/fusion.py", [f"{WAY}[fusion]"],
        "range(len(start)) if episode.instruction else ()",
        "range(len(start) - 1) if episode.instruction else ()"),
    Mutant("fusion: BOS is kept without an instruction", "further/fusion.py", [f"{WAY}[fusion]"],
        "range(len(start)) if episode.instruction else ()", "range(len(start))"),
    Mutant("padding of rows in context is seen", "gist.py", [RANKED],
        "positions_of(kept) < counts[:, None]", "positions_of(kept) <= counts[:, None]"),
    Mutant("generation sees padding", "llama.py", [WRITTEN],
        "positions_of(tokens) < lengths[:, None])", "positions_of(tokens) < T)"),
    # ----------------------------------------------------------------------------- rows, loss, the loop
    Mutant("targets shifted by one", "data.py", [BATCH],
        "[NO_LOSS] * (len(prompt) - 1) + target for",
        "[NO_LOSS] * (len(prompt) - 2) + target + [NO_LOSS] for"),
    Mutant("no loss on EOS", "data.py", [STEP],
        "[self.tokenizer.eos] if self.end", "[] if self.end"),
    Mutant("prompt without its last token", "data.py", [STEP],
        "len(text) - room) :] + end", "len(text) - room) :] + end[:-1]"),
    Mutant("few-shot training: a second BOS", "data.py", [PLAIN_BATCH],
        'query, budget, "continues")', "query, budget)"),
    Mutant("0-shot training without its instruction", "data.py", [DEFINITION],
        'instruct = "before" if self.method == "zeroshot" else self.instruct', "instruct = self.instruct"),
    Mutant("few-shot training: several queries a row", "data.py", [DEFINITION],
        'self.queries = QUERIES if self.method == "hyper" else 1', "self.queries = QUERIES"),
    Mutant("training: another row's prefix", "data.py", [BATCH],
        "[b for b, _, _ in queries]", "[(b + 1) % len(samples) for b, _, _ in queries]"),
    Mutant("mean of the batches' means", "train.py", [STEP],
        "loss = (weights * parts / counts).sum()",
        "loss = (weights * parts / torch.tensor([t.count(batch) for t in terms])).sum() / args.accumulate"),
    Mutant("a batch is divided by its own count", "train.py", [STEP],
        "loss = (weights * parts / counts).sum()",
        "loss = (weights * parts / torch.tensor([t.count(batch) for t in terms])).sum()"),
    Mutant("a term is divided by the targets' count", "train.py", [f"{STEP}[terms]"],
        "loss = (weights * parts / counts).sum()",
        "loss = (weights * parts / counts[0]).sum()"),
    Mutant("a process divides by its own count", "train.py", [PROCESSES_AGREE],
        "read, *counts = all_sum(counts.sum(0).to(device))",
        "read, *counts = counts.sum(0)"),
    Mutant("a process keeps its gradient", "train.py", [PROCESSES_AGREE],
        "all_sum(parameter.grad)", "parameter.grad"),
    Mutant("a teacher's query has a second BOS", "further/teacher.py", [f"{STEP}[terms]"],
        "bos = int((batch.select % T).min() > 0)", "bos = 0"),
    Mutant("a teacher's examples lose their BOS", "further/teacher.py", [f"{STEP}[terms]"],
        "tokens[bool(context) : last + 1]", "tokens[1 : last + 1]"),
    Mutant("a teacher reads with the trained set", "further/teacher.py", [f"{STEP}[terms]"],
        "as_past(T - bos)", "as_past(T - bos, hyper.downstream_adapter)"),
    Mutant("distillation: the divergence the other way round", "further/teacher.py", [f"{STEP}[terms]"],
        "F.kl_div(student, teacher,", "F.kl_div(teacher, student,"),
    Mutant("targets weigh what the context costs", "further/teacher.py", [f"{STEP}[terms]"],
        "(alone - taught)", "(taught - alone)"),
    Mutant("reconstruction after another marker", "further/reconstruct.py", [f"{STEP}[terms]"],
        "marker = run.formatter.tokenizer.eos", "marker = run.formatter.tokenizer.bos"),
    Mutant("language modelling: D before B and C", "further/lm.py", [LM],
        "torch.cat((a, batch.targets.view(B, -1), d), dim=1)",
        "torch.cat((a, d, batch.targets.view(B, -1)), dim=1)"),
    Mutant("gradients add up over steps", "train.py", [RESUMED],
        "optimizer.zero_grad()", "pass"),
    Mutant("a row depends on its place in the batch", "data.py", [NUMBERS],
        'random.Random(f"{seed} {number}")) for number in numbers]',
        'random.Random(f"{seed} {b}")) for b, _ in enumerate(numbers)]'),
    Mutant("each step reads the same rows", "train.py", [EACH_ROW],
        "(step * args.accumulate + i) * args.batch_size", "i * args.batch_size"),
    Mutant("a resumed run begins with the first rows", "train.py", [RESUMED],
        "disable=rank > 0)\n    micro_batches = get_batches(batches, args, step,",
        "disable=rank > 0)\n    micro_batches = get_batches(batches, args, 0,"),
    Mutant("a resumed run forgets the moments", "train.py", [RESUMED],
        'for key, t in part.items()}', 'for key, t in part.items() if key == "step"}'),
    Mutant("a resumed run forgets Adam's step", "train.py", [RESUMED],
        'for key, t in part.items()}', 'for key, t in part.items() if key != "step"}'),
    # ----------------------------------------------------------------------------------- answers, tasks
    Mutant("evaluation: another row's prefix", "eval.py", [RANKED],
        "int_tensor([row for row, _, _ in queries], run.device)",
        "int_tensor([0 for _ in queries], run.device)"),
    Mutant("few-shot evaluation: a second BOS", "eval.py", [RANKED],
        '-shot", shots_context, read, trained=False, instruct="continues")',
        '-shot", shots_context, read, trained=False, instruct="no")'),
    Mutant("answers of other queries", "eval.py", [RANKED],
        "for (_, e, q), text in zip(queries, texts)}", "for (_, e, q), text in zip(sorted(queries), texts)}"),
    Mutant("a choice's first token isn't scored", "eval.py", [RANKED],
        "else part.sum()", "else part[1:].sum()"),
    Mutant("choices are compared by their mean", "eval.py", [RANKED],
        'run.args.score == "mean"', "True"),
    Mutant("a choice's first token after the wrong one", "eval.py", [RANKED],
        "n * T + len(prompt) - 1,", "n * T + len(prompt) - 2,"),
    Mutant("a choice sees the choices before it", "eval.py", [RANKED],
        "(branch[:, None] == branch[:, :, None])", "(branch[:, None] <= branch[:, :, None])"),
    Mutant("other task: the task's own gists", "eval.py", [RANKED],
        "others[i % len(others)] if column.other else episode", "episode"),
    Mutant("other task: one of the same dataset", "eval.py", [OTHER],
        "tasks[i].group != tasks[t].group", "i != t"),
    Mutant("a score is known whatever was trained", "eval.py", [KNOWN],
        'f"{held_out.digests[item]} {step if trained_by(run, column) else 0}"', "held_out.digests[item]"),
    Mutant("a score is known whatever is read", "eval.py", [KNOWN],
        "repr((how, encoded, right,", "repr((how, right,"),
    Mutant("a trained set's score is known forever", "eval.py", [KNOWN],
        "trained_set = column.trained and run.hyper.downstream_adapter", "trained_set = False"),
    Mutant("a checksum forgets a tensor", "llama.py", [CHECKSUM],
        "for name in sorted(samples):", "for name in sorted(samples)[1:]:"),
    Mutant("a held-out task among the training tasks", "tasks/p3.py", [HELD_OUT],
        "for name in lists[split]}", 'for name in lists["train"] + lists["test"][:1]}'),
    Mutant("held-out datasets among the training tasks", "tasks/p3.py", [HELD_OUT_BY_NAME],
        '(dataset is not None) != (split == "test")', 'dataset is None and split == "test"'),
    Mutant("training: a query among its examples", "tasks/p3.py", [OWN_EXAMPLES],
        "list(unasked(picked[queries:], picked[:queries]))", "picked[queries:]"),
    Mutant("evaluation: a query among its examples", "tasks/p3.py", [OWN_EXAMPLES],
        "unasked(map(self.train.__getitem__, order), queries)", "map(self.train.__getitem__, order)"),
    Mutant("the base's embeddings are trained, too", "llama.py", [f"{EVERY_KIND}[sample]"],
        "nn.Parameter(tensor.to(device, dtype, copy=True), requires_grad=False))\n    if",
        "nn.Parameter(tensor.to(device, dtype, copy=True), requires_grad=True))\n    if"),
    Mutant("the base's matrices are trained, too", "llama.py", [f"{EVERY_KIND}[sample]"],
        "nn.Parameter(weight.to(device, dtype, copy=True), requires_grad=False)",
        "nn.Parameter(weight.to(device, dtype, copy=True), requires_grad=True)"),
    Mutant("gists that aren't trained", "run.py", [f"{EVERY_KIND}[sample]"],
        'hyper.gists.requires_grad_(args.method == "hyper")', "hyper.gists.requires_grad_(False)"),
    # --------------------------------------------------------------------------------------- arithmetic
    Mutant("rotary: neighbours are pairs", "llama.py", [LLAMA],
        "x1, x2 = x.float().chunk(2, dim=-1)",
        "x1, x2 = x.float().unflatten(-1, (-1, 2)).unbind(-1)"),
    Mutant("rotary: backwards", "llama.py", [LLAMA],
        "(x1 * cos - x2 * sin, x2 * cos + x1 * sin)", "(x1 * cos + x2 * sin, x2 * cos - x1 * sin)"),
    Mutant("norm without its eps", "llama.py", [JOINT],
        "torch.rsqrt(mean + self.eps)", "torch.rsqrt(mean)"),
    Mutant("norm of a sum instead of a mean", "llama.py", [LLAMA],
        ".square() / x.shape[-1]", ".square()"),
    Mutant("NF4: the scale of another block", "lora.py", [QUANTIZED],
        "torch.cat([state.absmax for state in states])",
        "torch.cat([state.absmax for state in states]).roll(1)"),
]  # fmt: skip


def copy_project(folder: Path) -> None:
    """All that git would track. The copy has no ../shared beside it, so tests with real data are skipped."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in names:
        if (ROOT / name).is_file() and not name.startswith("tiny/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "tiny").symlink_to(ROOT / "tiny")


def run_pytest(folder: Path, argv: list[str], output: Path) -> None:
    """Runs in a process forked from one that has imported LIBRARIES, which takes longer than most tests."""
    import pytest

    with open(output, "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.chdir(folder)
    tempfile.tempdir = str(output.parent)  # what tests leave behind goes with the copy
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]  # import the copy instead
    sys.dont_write_bytecode = True  # tiny/ is a link into the project
    sys.exit(pytest.main(argv))


def run_tests(tests: Sequence[str], mutant: Mutant | None = None) -> tuple[str, float]:
    """The first failing test, and seconds. "" if all passed, "skipped" if none ran, "broken: …" otherwise."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hyperllama-mutant-") as name:
        folder, output = Path(name) / "project", Path(name) / "output"
        copy_project(folder)
        if mutant:
            path = folder / mutant.file
            path.write_text(path.read_text("utf-8").replace(mutant.old, mutant.new), "utf-8")
        argv = [*PYTEST, *(f"tests/test_{test}" for test in tests)]
        process = PROCESSES.Process(target=run_pytest, args=(folder, argv, output))
        process.start()
        process.join(LIMIT)
        process.kill()
        process.join()
        lines = output.read_text("utf-8").splitlines() if output.exists() else []
    seconds = time.monotonic() - began
    failed = [match[1] for line in lines if (match := re.match(r"FAILED tests/(.+?)( - .*)?$", line))]
    if failed:  # (a process may still stumble on its way out)
        return failed[0], seconds
    if process.exitcode == 0:
        return ("" if " passed" in lines[-1] else "skipped"), seconds
    return f"broken: status {process.exitcode}, {lines[-1] if lines else 'no output'}", seconds


def check(mutants: Sequence[Mutant], pool: ThreadPoolExecutor) -> list[str]:
    """Why results would mean nothing: an old text that isn't unique, tests that fail without mutants."""
    problems = []
    for mutant in mutants:
        count = (ROOT / mutant.file).read_text("utf-8").count(mutant.old)
        if count != 1:
            problems.append(f"{mutant.name}: its old text occurs {count} times in {mutant.file}, not once")
    if problems:
        return problems
    tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
    parts = [part for part in (tests[n::AT_ONCE] for n in range(AT_ONCE)) if part]
    results = [result for result, _ in pool.map(run_tests, parts)]
    return [f"without any mutant: {result}" for result in results if result not in ("", "skipped")]


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    mutants = [m for m in MUTANTS if not args.names or any(name in m.name for name in args.names)]
    if args.list:
        print(*(f"{mutant.name:<50}{mutant.file}" for mutant in mutants), sep="\n")
        return 0
    began, survived = time.monotonic(), 0
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    PROCESSES.set_forkserver_preload(LIBRARIES)
    unknown = [name for name in args.names if not any(name in mutant.name for mutant in mutants)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        problems = [f"no mutant is called {name!r}" for name in unknown] or check(mutants, pool)
        if problems:
            print(*problems, sep="\n", file=sys.stderr)
            return 2
        print(f"{'mutant':<50}{'file':<22}{'seconds':>7}  killed by")
        for mutant, (result, seconds) in zip(mutants, pool.map(lambda m: run_tests(m.tests, m), mutants)):
            survived += not result or result.startswith("broken")
            killer = result or "SURVIVED"
            print(f"{mutant.name:<50}{mutant.file:<22}{seconds:>7.1f}  {killer}", flush=True)
    print(f"{len(mutants)} mutants, {survived} survived, {time.monotonic() - began:.0f} seconds")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
