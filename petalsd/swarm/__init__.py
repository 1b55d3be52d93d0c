"""The Petals wire: the DHT, the streams, the records. The only package that imports hivemind."""
