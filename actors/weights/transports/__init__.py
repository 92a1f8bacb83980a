"""The ways of buckets from the policy's ranks to the workers of engines; docs/adr/0021-transports.md compares them.

transport    placement        a bucket travels                                      device in tests
collective   separate GPUs    by broadcast from rank 0: NCCL, or gloo between CPUs  CPU (gloo)
shared       the same GPU     as a handle to memory that both sides map: CUDA IPC,  CPU (an anonymous file)
             or the same host or a file in memory
host         any              through Ray's object store; also the fallback         CPU

actors/remote/transports.py drives them; this package holds what runs in the actors.
"""
