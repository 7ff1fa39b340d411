"""Image, video and sound files -> RGB images and 16 kHz waveforms, with untrusted files in mind.

Only listed formats are opened, sizes are checked before pixels are decoded, and every error of a
decoder becomes a `BadSample` that names the file. Imports only tally.BadSample.

images       an image file -> RGB pixels, after its size has been checked
containers   open audio and video containers with PyAV, with limits and clear errors
videos       a video file, an animated image, or a folder of frames -> a few RGB frames
sounds       a sound file, or the sound track of a video -> a waveform; its length from the header
"""
