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
run p3/D --task p3 --model $base --downstream lora
run p3/CD --task p3 --model $c --downstream lora
run p3/shared --task p3 --model $base --downstream shared
run p3/fine-tuned_0-shot --task p3 --model $base --method zeroshot
run p3/fine-tuned_16-shot --task p3 --model $base --method fewshot

run sni/definition --task sni --model $base --method zeroshot
run sni/definition_and_examples --task sni --model $base --method fewshot
run sni/HyperLlama --task sni --model $base
run sni/C --task sni --model $c
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
echo "all runs done after $(($(date +%s) - began)) s"
