"""What the paper does not speak of.  On a first reading: tutorials; with train.py, start and loading.

errors         a wrong input is one line and exit status 2
command_line   the options of train.py and decode.py
files          a file is written whole or not at all; weights are opened as data
names          other projects' names of files and tensors
ctranslate2    faster-whisper's file format
llada          what LLaDA's folder says of itself
hub            where the released models are published
processes      torchrun's processes, the signals that stop them, the lock on a run's folder
recordings     any audio file as 16 kHz mono; where to cut a long one
manifests      where the entries of a manifest lie in its file, and their fields in each format
loading        manifests of millions of lines, mixtures, micro-batches, the order of a run
checkpoints    what --resume goes on from
held_out       the loss on examples that are never trained on
log            log.jsonl and the progress bar
start          what a stage begins with: model, files, settings
plan           train.py --dry-run
fresh          random weights
ctc            the small model's loss of the transcript, beside the paper's
variations     the small model's augmentation, and stage 0's imitation of audio
optimizers     AdamW, and Muon for a small model's matrices
int8           decode.py --int8
terminal       decode.py --show and --stream
pieces         a clip beyond the window is asked in pieces
tutorials      what each file of the root shows when it is run alone
"""
