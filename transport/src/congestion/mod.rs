//! Congestion control: which controller a connection uses, and the seam to QUIC. [`adaptive`] knows
//! nothing of QUIC, `quic` nothing of control.

pub mod adaptive;
pub(crate) mod quic;
pub(crate) mod steering;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The controllers to choose from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Congestion {
    /// Our own: made for long links with random loss.
    #[default]
    Adaptive,
    /// As most of the Internet; collapses under random loss.
    Cubic,
    /// RFC 9002.
    NewReno,
    /// BBR as in quinn: keeps its rate under loss, but fills the queue.
    Bbr,
}

impl fmt::Display for Congestion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Adaptive => "adaptive",
            Self::Cubic => "cubic",
            Self::NewReno => "newreno",
            Self::Bbr => "bbr",
        })
    }
}

impl FromStr for Congestion {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Adaptive, Self::Cubic, Self::NewReno, Self::Bbr]
            .into_iter()
            .find(|congestion| congestion.to_string() == text)
            .ok_or_else(|| {
                format!("'{text}' is not a congestion control: adaptive, cubic, newreno or bbr")
            })
    }
}
