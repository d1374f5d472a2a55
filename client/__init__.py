"""Our code on a node: it personalizes for its users and turns their data into one clipped integer sum.

It must never let anything else that depends on a user's data leave the node.
"""
