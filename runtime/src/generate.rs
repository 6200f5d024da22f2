//! Text generation: one sequence with a callback, or many at once.

use crate::{Decoder, RuntimeError, Sampler, Sampling};

/// One sequence to continue.
pub struct Request {
    /// Token ids to continue; not empty.
    pub prompt: Vec<u32>,
    /// How its tokens are chosen.
    pub sampling: Sampling,
}

/// Continues every prompt by at most `max_tokens` tokens; a sequence ends with the first id of `stop`,
/// which is the last of its result. `on_token(sequence, id)` is called for every other token and stops that
/// sequence by returning false.
///
/// # Errors
/// Ids outside the vocabulary, sampling parameters out of range, activations that are not finite.
///
/// # Panics
/// If a prompt is empty.
pub fn generate(
    decoder: &Decoder<'_>,
    requests: &[Request],
    max_tokens: usize,
    stop: &[u32],
    mut on_token: impl FnMut(usize, u32) -> bool,
) -> Result<Vec<Vec<u32>>, RuntimeError> {
    let mut done: Vec<Vec<u32>> = vec![Vec::new(); requests.len()];
    let mut samplers = requests
        .iter()
        .map(|request| Sampler::new(request.sampling, decoder.cpu().isa))
        .collect::<Result<Vec<_>, _>>()?;
    let mut caches: Vec<_> = requests
        .iter()
        .map(|request| decoder.cache(request.prompt.len() + max_tokens))
        .collect();
    let mut next: Vec<Vec<u32>> = requests
        .iter()
        .map(|request| request.prompt.clone())
        .collect();
    assert!(
        next.iter().all(|prompt| !prompt.is_empty()),
        "a prompt has at least one token"
    );
    let mut running: Vec<usize> = (0..requests.len()).collect();
    for _ in 0..max_tokens {
        if running.is_empty() {
            break;
        }
        let inputs: Vec<&[u32]> = next.iter().map(Vec::as_slice).collect();
        let last: Vec<_> = inputs
            .iter()
            .map(|input| input.len() - 1..input.len())
            .collect();
        let hidden = decoder.forward_for(&inputs, Some(&mut caches), &last)?;
        let logits = decoder.logits(&hidden);
        let vocab = decoder.config().vocab_size;
        let mut keep = Vec::with_capacity(running.len());
        for (&sequence, logits) in running.iter().zip(logits.chunks_exact(vocab)) {
            let id = samplers[sequence].choose(logits);
            done[sequence].push(id);
            let goes_on = !stop.contains(&id) && on_token(sequence, id);
            keep.push(goes_on.then_some(id));
        }
        // Sequences that ended leave the batch; the others feed their last token.
        let mut kept = keep.iter();
        caches.retain(|_| kept.next().is_some_and(Option::is_some));
        let mut kept = keep.iter();
        running.retain(|_| kept.next().is_some_and(Option::is_some));
        next = keep.into_iter().flatten().map(|id| vec![id]).collect();
    }
    Ok(done)
}
