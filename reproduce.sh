#!/bin/sh
# Every table in miniature, from scratch: three seeds of each row, then RESULTS.md. It takes about an
# hour on two cores (two runs at a time, a thread each). Finished runs are kept: it can be run again.
set -eu
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1
if [ "${1:-}" = finish ]; then # finish PROGRAM --out DIR …: unless it is finished; what a killed run left is thrown away
    shift
    if [ -e "$3/results.json" ]; then exit; fi
    rm -rf "$3" && mkdir -p "$(dirname "$3")" && echo "$3"
    python "$@" > "$3.log" 2>&1 || { echo "failed: see $3.log"; exit 1; }
    exit
fi

all=runs/reproduce
began=$(date +%s)
mkdir -p $all
: > $all/jobs

run() { # run TABLE/ROW options…; SEED stands for the run of the same seed
    row=$1; shift
    for seed in 0 1 2; do echo "train.py --out $all/$row/seed$seed --seed $seed $*" | sed "s/SEED/seed$seed/"; done >> $all/jobs
}
plain() { # an untouched model
    row=$1; shift
    for seed in 0 1 2; do echo "eval.py --out $all/$row/seed$seed --seed $seed $*" >> $all/jobs; done
}

base=tiny/llama c=tiny/llama-c # before and after compression hyperpretraining

run p3/HyperLlama --task p3 --model $base
run p3/C --task p3 --model $c
run p3/C_one_step --task p3 --model $c --steps 1 # what is there before training
run p3/D --task p3 --model $base --downstream lora
run p3/CD --task p3 --model $c --downstream lora
run p3/shared --task p3 --model $base --downstream shared
run p3/fine-tuned_0-shot --task p3 --model $base --method zeroshot
run p3/fine-tuned_16-shot --task p3 --model $base --method fewshot

for n in 1 2 4 8; do run gists/$n --task p3 --model $c --gists $n --no-controls; done # 16: p3/C
run gists/32 --task p3 --model $c --gists 32 --measure 10 # the checkpoint has 16: these start as words
for n in 1 2 4 8; do run shots/$n --task p3 --model $c --shots $n --no-controls; done

run sni/definition --task sni --model $base --method zeroshot
run sni/definition_and_examples --task sni --model $base --method fewshot
run sni/HyperLlama --task sni --model $base
run sni/C --task sni --model $c
run sni/C_one_step --task sni --model $c --steps 1
run sni/D --task sni --model $base --downstream lora
run sni/I --task sni --model $base --instruction-downstream
run sni/CDI --task sni --model $c --downstream lora --instruction-downstream
run sni/fused --task sni --model $base --fuse-instruction
run sni/C_fused --task sni --model $c --fuse-instruction

plain symbol/0-shot --task symbol --model $base --method zeroshot --sets 10 --limit 20
plain symbol/few-shot --task symbol --model $base --method fewshot --sets 10 --limit 20
run symbol/symbol-tuned_few-shot --task symbol --model $base --method fewshot
run symbol/HyperLlama --task symbol --model $base
run symbol/C --task symbol --model $c
run symbol/C_one_step --task symbol --model $c --steps 1
run symbol/D --task symbol --model $base --downstream lora

run text/from_the_base --task hyperpretrain --model $base
run text/from_C --task hyperpretrain --model $c

run prefix/hyper --task prefix --model $c --batch-size 4 --init hyper --run $all/p3/C/SEED
run prefix/text --task prefix --model $c --batch-size 4 --init text
run prefix/shared --task prefix --model $c --batch-size 4 --init shared
run prefix/random --task prefix --model $c --batch-size 4 --init random
run prefix/reparam --task prefix --model $c --batch-size 4 --init reparam
run prefix/propagate --task prefix --model $c --batch-size 4 --init propagate

run p3/C_shared --task p3 --model $c --downstream shared
run p3/C_NF4 --task p3 --model $c --quantize

xargs -P "${JOBS:-2}" -L 1 ./reproduce.sh finish < $all/jobs
mkdir -p figures
python eval.py --plot $all/prefix/*/seed? --out figures/prefix-tuning.png
python eval.py --plot $all/gists/32/seed? --out figures/training.png
python eval.py --plot $all/gists/*/seed? $all/p3/C/seed? --by gists --out figures/gists.png
python eval.py --plot $all/shots/*/seed? $all/p3/C/seed? --by shots --out figures/shots.png

rows() { # rows TABLE ROW…: the table of these rows
    table=$1; shift
    echo
    for row; do echo "$all/$table/$row"; done | xargs python eval.py --table
    echo
}

{
cat << 'END'
# Results in miniature

Made by `./reproduce.sh`: three seeds a row, mean ± standard deviation over them. The model has 1.0 million parameters
and its world is a few hundred words: this shows that the mechanism works and what it takes, not how well a real Llama-2
does. `tiny/llama` is the plain model, `tiny/llama-c` the same after compression hyperpretraining (C). 0-shot and
few-shot columns are the untouched model of that row; the other columns are controls: the answering model without a
prefix, with the gists of another task, with the keys and values of the examples mean-pooled to as many as there are
gists, and with whole examples in as many raw tokens (at least one). Two runs at a time on two cores of an AMD EPYC,
November 2026; seconds are those of training and evaluation together (some rows had other work beside them: D, shared).

## P3

Accuracy, average of 8 held-out prompts, 16 examples, 5 draws of them. Chance is 45.8.
END
rows p3 HyperLlama C C_one_step D CD shared fine-tuned_0-shot fine-tuned_16-shot C_shared C_NF4
cat << 'END'
The paper's P3 numbers (7B) are 55.4 for fine-tuned 0-shot, 55.8 HyperLlama, 56.8 C, 57.2 D, 57.2 CD, 61.2 fine-tuned
16-shot. What holds: without examples nothing can be known (fine-tuned 0-shot is at chance), and with them in context
most is. What doesn't: C and D are one point each there, and here C is everything and D nothing. Without C, HyperLlama, D
and shared stay at chance, and their gists are worth no more than another task's: 300 steps of a rank-8 LoRA on so small a
model don't invent compression. With C it is there before any training, as the row of a single step shows, and training
neither adds to it nor harms; but it does bring gists to work that start as words (32 of them:
[figures/training.png](figures/training.png)). With C, gists of the examples are worth
what the same model makes of all examples in context, and fine-tuned 16-shot isn't ahead: `tiny/llama-c` has learned to
compress on texts much like these tasks, for longer than any row was fine-tuned. Quantizing the base to NF4
costs one point, about the spread over seeds.

## Super-NaturalInstructions

ROUGE-L, mean over the instances of 12 held-out tasks; two positive examples. "definition" and "definition and
examples" are fine-tuned language models that see these in context.
END
rows sni definition definition_and_examples HyperLlama C C_one_step D I CDI fused C_fused
cat << 'END'
In the paper, definition only < every HyperLlama < definition + examples, I helps markedly, and C and D together help.
What holds: examples are worth 26 points to the fine-tuned model, because half of the definitions don't say how to write
the answer; I helps HyperLlama by as much; CDI is the best row. What doesn't: without C, HyperLlama and D are below
definition only (their gists carry something, as no prefix and another task's gists show, but not the definition), and
I and fusion only bring the definition back: they are where definition only is. With C, gists are worth more than
definition and examples in context. The untouched `tiny/llama-c` is a poor writer of answers in context (0-shot and
2-shot columns): hyperpretraining taught it to answer behind gists. The untouched plain model beats "definition" because
it leaves out what it can't know, while the fine-tuned one guesses.

## Symbol tuning

Accuracy, average of 5 held-out sets, 20 queries each, 4 examples per class; each run is the mean of 10 draws of symbols,
formats and examples. Chance is 43.3.
END
rows symbol 0-shot few-shot symbol-tuned_few-shot HyperLlama C C_one_step D
cat << 'END'
The paper's ordering is 0-shot = chance; HyperLlama slightly above; few-shot without any tuning far above; symbol-tuned
few-shot best. It holds for the rows without C: HyperLlama and D are at chance, the untouched model's few-shot is far
above, tuning adds a few points. With C, HyperLlama reaches the symbol-tuned model, but not what `tiny/llama-c` itself makes of
the examples in context: labels of several arbitrary letters or digits are what 16 gists hold least well.

## Compression hyperpretraining on text

`--task hyperpretrain`, 300 steps on `tiny/text`: loss per token on segment C behind B, with the gists of A and D (result),
without them (0-shot), with A and D in full context, and with another text's gists.
END
rows text from_the_base from_C
cat << 'END'
Started from the plain model, the gists keep an eighth of what A and D in full are worth: which words occur, not yet which
goes with which. Started from `tiny/llama-c`, which knows how to compress, they keep all of it, and their loss is even
below that of the full context, because only gists are trained here. Another text's gists do harm: it relies on them.

## Prefix tuning

Accuracy on the 8 held-out prompts of P3 after 300 steps on their training rows, by what the prefix of 16 starts from;
the model is `tiny/llama-c`, "hyper" starts from the gists that the run "C" above makes of 16 examples.
END
rows prefix hyper text shared random reparam propagate
cat << 'END'
![accuracy during prefix tuning](figures/prefix-tuning.png)

In the paper (7B) the order is random + reparametrisation 77.3, hyper 67.3, shared 59.0, random 57.7. Here seven of eight
prompts are so easy that every start ends near 100. On the one that isn't, `place_spot`, the paper's order shows: reparam
89.0, hyper 80.3, shared 78.0, random 76.3. On average hyper is ahead of the other flat prefixes in each seed, by a quarter
of a point to one. What differs more is the way there: hyper starts at 89, where the others are at chance, and is at 96
after 30 steps, when the second best, propagation with half of the parameters, is at 86; the first tokens of the examples
("text") are no better a start than random numbers. The learning rate (an MLP's is a tenth of a flat prefix's) was chosen
by the loss on training rows.
END
} > RESULTS.md
echo "RESULTS.md written after $(($(date +%s) - began)) s"
