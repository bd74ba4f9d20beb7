//! TCP's congestion control for network namespaces. A new namespace may choose only among the controls that
//! the initial one lists as allowed: this extends that list for as long as it lives, and does nothing else.

use std::fs;

use anyhow::{Context, Result, ensure};

const ALLOWED: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";
const AVAILABLE: &str = "/proc/sys/net/ipv4/tcp_available_congestion_control";

/// The list of the initial namespace, extended. Dropping this puts the former list back.
#[derive(Debug)]
pub struct Allowed {
    before: Option<String>,
}

impl Allowed {
    /// Has every one of `controls` allowed.
    pub fn extend(controls: &[&str]) -> Result<Self> {
        let read = |path| fs::read_to_string(path).with_context(|| format!("cannot read {path}"));
        let (allowed, available) = (read(ALLOWED)?, read(AVAILABLE)?);
        let missing: Vec<_> = controls
            .iter()
            .copied()
            .filter(|control| !lists(&allowed, control))
            .collect();
        if missing.is_empty() {
            return Ok(Self { before: None });
        }
        for control in &missing {
            ensure!(
                lists(&available, control),
                "this kernel has no TCP congestion control '{control}'; try 'modprobe tcp_{control}'"
            );
        }
        let extended = format!("{} {}", allowed.trim(), missing.join(" "));
        fs::write(ALLOWED, extended)
            .with_context(|| format!("cannot write {ALLOWED}; the bench needs root"))?;
        Ok(Self {
            before: Some(allowed.trim().to_owned()),
        })
    }
}

impl Drop for Allowed {
    fn drop(&mut self) {
        let Some(before) = &self.before else { return };
        if let Err(error) = fs::write(ALLOWED, before) {
            eprintln!("{ALLOWED} was '{before}' and cannot be set back: {error}");
        }
    }
}

fn lists(list: &str, control: &str) -> bool {
    list.split_whitespace().any(|word| word == control)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_whole_words() {
        assert!(lists("reno bbr\n", "bbr"));
        assert!(!lists("reno bbr2\n", "bbr"));
    }
}
