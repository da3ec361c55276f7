"""ONNX in, ONNX out. Steps, in order, a file each:

load      read and validate a model; write one
float16   convert a model to float16 (on request)
shapes    shapes, types, and proofs that two tensors have the same shape
graph     a read-only view of a graph: producers, users, constants
activation, match
          find stages (convolution, what folds into it, its activation, its residual) and chains of stages
plan      ask the planner which chains to fuse, and how
shuffle   find what only moves channels
layout    choose which tensors are channels-last
emit      write the nodes, and the functions they call
check     compare with the original on the CPU

Nothing is changed before `emit`, and then only what a module replaces and what a layout change touches.
"""
