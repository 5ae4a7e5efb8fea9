"""Answers of a model: a folder opened in this process, or a server.

load             opening a model, an adapter or a diff for answers
local_model      generating in this process
token_stream     text while tokens come
client           servers with OpenAI's API
server_errors    what a server's answer holds, within limits, and what its error means
backend          a server or a folder, by one name
demo             the engine behind the demo's page
"""
