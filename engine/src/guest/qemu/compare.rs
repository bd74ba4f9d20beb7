//! Whether two QEMUs are alike enough for a guest to go from one to the other. It compares what was
//! asked elsewhere and asks nothing itself.

use hybridmig_transport::message::{GuestDescription, Refusal, RefusalCode};

use super::facts::MUST_BE_EQUAL;

/// Compares the guest offered with the one that QEMU here would run: notes, or why it cannot come.
pub fn compare(
    offered: &GuestDescription,
    here: &GuestDescription,
) -> Result<Vec<String>, Refusal> {
    let fact =
        |side: &GuestDescription, name: &str| side.facts.get(name).cloned().unwrap_or_default();
    if offered.kind != here.kind {
        return Err(refusal(vec![format!(
            "the guest is a {} guest, this side waits for a {} guest",
            offered.kind, here.kind
        )]));
    }
    let mut reasons = Vec::new();
    let mut notes = Vec::new();
    for (name, option) in MUST_BE_EQUAL {
        let (there, ours) = (fact(offered, name), fact(here, name));
        if there != ours {
            reasons.push(format!(
                "{name} differs: '{there}' at the source, '{ours}' here; make {option} equal"
            ));
        }
    }
    let same_accelerator = fact(offered, "accelerator") == fact(here, "accelerator");
    if !same_accelerator {
        notes.push(format!(
            "the guest moves from {} to {}",
            fact(offered, "accelerator"),
            fact(here, "accelerator")
        ));
    }
    let features = [offered, here].map(|side| fact(side, "cpu-features"));
    if features[0] != features[1] && features.iter().all(|hash| !hash.is_empty()) {
        // Between versions QEMU books derived bits (HT, CMP_LEGACY) differently, and another
        // accelerator masks the model differently: only like can be compared with like.
        if same_accelerator && series(&fact(offered, "qemu")) == series(&fact(here, "qemu")) {
            reasons.push(
                "the CPU features that the guest would see differ though the model is the \
                 same: name a model that both hosts have in full (-cpu MODEL,enforce)"
                    .to_owned(),
            );
        } else {
            notes.push(
                "the CPU features of the two sides could not be compared; the models are equal"
                    .to_owned(),
            );
        }
    }
    if fact(offered, "qemu") != fact(here, "qemu") {
        notes.push(format!(
            "QEMU {} at the source, {} here",
            fact(offered, "qemu"),
            fact(here, "qemu")
        ));
    }
    if reasons.is_empty() {
        Ok(notes)
    } else {
        Err(refusal(reasons))
    }
}

/// `7.2` of `7.2.22`.
fn series(version: &str) -> &str {
    version
        .rsplit_once('.')
        .map_or(version, |(series, _)| series)
}

fn refusal(reasons: Vec<String>) -> Refusal {
    Refusal {
        code: RefusalCode::Guest,
        reasons,
    }
}
