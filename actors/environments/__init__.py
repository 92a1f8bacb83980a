"""Environments: what the policy talks to in several turns, and the turns themselves.

contract     what environments and agents are, for those who write one
server       calls environments, in the contained process
agents       runs agents there, and serves them the policy
calls        what chat-completion calls of agents ask and are answered
process      the other end of the process: episodes that survive its end
talks        what an environment's answers mean for the next prompt
segments     the tokens of an episode
episodes     plays a shard's episodes turn by turn on an engine
verifiers    an agent that plays tasks of the package verifiers
calculator   a calculator for arithmetic problems (GSM8K)
word_game    a word-chain game against a seeded opponent
"""
