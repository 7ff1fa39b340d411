"""This process and this machine. Imports no other folder of the package.

cpu           XLA's settings for CPUs, and what a program does before its first computation
memory        glibc's allocator: keep freed memory, use huge pages
files         write a file completely or not at all; JSON of arrays; errors that name the file
pipes         end quietly when the reader of standard output has gone
program       the name by which the user called the running program
environment   versions, devices and git commit, for env.json
"""
