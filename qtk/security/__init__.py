"""What attackers get of a float and of a quantized model.

Backdoors that rounding wakes: planted to test with, looked for, rounded away.

backdoor/  attacks, a file each
evidence/  what speaks for a backdoor, a file each
audit      qtk.audit

A copy of the model, by asking it.

thief/     what is asked, a file each
clone      the network that learns from the answers
defence/   training that leaves a thief little: isolate (InI)
theft      the result; cloning, qtk.steal
"""
