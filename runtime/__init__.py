"""What programs and long runs need and no paper speaks of; a reader of the method can skip this folder.

errors         a wrong input is one line and exit status 2
files          a file is whole or not there
processes      torchrun's processes, the signals that stop them, the lock on a run's folder
manifests      where the entries of a manifest lie in its file
loading        manifests of millions of lines, mixtures, micro-batches, the order of a run
checkpoints    what --resume goes on from
log            log.jsonl and the progress bar
plan           train.py --dry-run
muon           the optimizer for a small model's matrices
int8           decode.py --int8
ctranslate2    faster-whisper's file format
terminal       decode.py --show and --stream
"""
