"""JSON records in, batches of numpy arrays out. Imports config only: neither jax nor the models.

record_files   a JSON list or JSON lines on disk -> one record at a time
records        a record checked: roles, answers, placeholders, paths inside the data root
sources        settings -> files: the embedded data set, the cache folder, the tokenizer
conversation   turns -> pieces of text and media that know whether they are learned -> token ids
tokenizer      SentencePiece, as the original models apply it
media/         image, video and sound files -> pixels and waveforms
features/      pixels and waveforms -> what each encoder reads (one file per encoder)
processors     a media file -> the pool entries of a batch
samples        a record -> a stream of token positions, measured or loaded
stream         that stream, cut to the row length
index          sizes of all records, measured once and cached
packing, plan  which samples share a row, which rows form which batch, for all epochs
batch          the arrays that the model receives: the contract with models/
batch_writer   streams -> the rows of a batch
batch_reader   the batch of one step, read in a thread or in a worker process
workers        how a worker process reacts to signals and to the end of the program
pipeline       the loader: batches in order, read ahead, and resumed from a checkpoint
tally          bad, truncated and capped samples, counted by reason
embedded/      a small data set that the package makes by itself
"""
