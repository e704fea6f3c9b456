"""Between hospitals: who is who, what a hospital allows, what a study asks of it, and the signed yes.

keys         private keys, made where they stay
identity     requests and certificates: a name, a role and a time, signed by the consortium's root
checks       whether a certificate is that of a member, and of which
signed       documents that only their signer can have written
roster       the signed list of members, whose version only rises
member       a member's folder: its key, its certificate, whom it believes
kit          what the coordinator sends to a new member
coordinator  the coordinator's folder: who is admitted and revoked
policy       what a hospital allows
catalogue    what it has, and what of that may be shown outside
asks         what a study asks of it (``leaving``: how large; ``rehearsal``: how often; ``words``: said to people)
approval     its signed yes or no
proposals    the studies that lie before it
"""
