"""A model of the swarm behind the HTTP interface that most front ends speak: OpenAI's completions and chats."""
