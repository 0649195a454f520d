"""Magics that run on the host: `%snapshot`, `%restore`, `%undo`, `%%fork`, `%vm`, `%pool`.

names      which there are, and a cheap look whether a cell may hold one (all that the kernel process imports at its start)
split      cuts a cell into parts for the guest and magics for the host
engine     runs such a cell part by part, as one cell to the client
cell       such a cell, and notebook, its machine and history, as the magics see them
arguments  options, usage errors, help
assist     Tab and Shift-Tab
render     draws outputs of several machines side by side
snapshots, fork, machine   the magics themselves
"""
