"""Pixels and waveforms -> what each encoder reads, in numpy. Imports only media.sounds.SAMPLE_RATE.

clip      RGB images -> normalised pixels, as CLIPImageProcessor computes them
sound     waveforms -> chunks, and the filtering that the two files below share
whisper   a chunk -> log-mel spectrogram, as WhisperFeatureExtractor computes it
beats     a chunk -> filter banks, as BEATs calls torchaudio's compliance.kaldi.fbank
"""
