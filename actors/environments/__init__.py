"""Environments: what the policy talks to in several turns, and the turns themselves.

contract     what an environment is, for those who write one
server       calls environments, in the contained process
process      the other end of it: episodes that survive the end of their process
episodes     plays a shard's episodes turn by turn on an engine
calculator   a calculator for arithmetic problems (GSM8K)
word_game    a word-chain game against a seeded opponent
"""
