"""From a frame to a claim: intervals, sentences, the stages of a flow, the paper's claims."""
