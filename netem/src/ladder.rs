//! Named links, from a cable to a bad mobile network: what is measured on them can be compared, and
//! no magic numbers stand in tests and scenarios.
//!
//! Delays of the long ones are round-trip times as the big clouds publish them between their regions
//! (medians of 2023–2025, rounded), halved; loss and queues are typical of the path that the
//! name says, and each rung says where they come from.

use crate::spec::LinkSpec;

/// One named link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rung {
    /// Its name, which may stand as the first word of a description.
    pub name: &'static str,
    /// Its description, in the grammar of [`spec`](crate::spec).
    pub link: &'static str,
    /// What it is like, and where the numbers come from.
    pub about: &'static str,
}

impl Rung {
    /// The parsed description.
    pub fn spec(&self) -> LinkSpec {
        let spec = self.link.parse();
        spec.expect("every rung is parsed by a test of this module")
    }
}

/// All of them, the best first.
pub const LADDER: &[Rung] = &[
    Rung {
        name: "lan",
        link: "delay 100us rate 1gbit limit 5ms",
        about: "One switch of a machine room: 0.2 ms RTT, gigabit Ethernet, about 600 KB of switch \
                buffer, no loss.",
    },
    Rung {
        name: "metro",
        link: "delay 1ms 50us rate 1gbit loss 0.001% limit 10ms",
        about: "Two data centres of one city, such as two zones of one cloud region: 1–2 ms RTT, \
                leased gigabit, loss as carriers' service levels allow it.",
    },
    Rung {
        name: "regional",
        link: "delay 5ms 200us rate 500mbit loss 0.01% limit 20ms",
        about: "Neighbouring countries or states: 10 ms RTT (Frankfurt–Paris, Virginia–Ohio).",
    },
    Rung {
        name: "continental",
        link: "delay 20ms 500us rate 500mbit loss 0.05% limit 50ms",
        about: "Across a continent on a shared link: 40 ms RTT is Ireland–Poland; coast to coast in \
                North America is 60–70 ms.",
    },
    Rung {
        name: "transatlantic",
        link: "delay 40ms 500us rate 200mbit loss 0.1% limit 50ms",
        about: "London–Virginia: 75–80 ms RTT; a share of 200 Mbit/s of a busy transit link with \
                0.1 % loss.",
    },
    Rung {
        name: "transpacific",
        link: "delay 75ms 1ms rate 200mbit loss 0.5% limit 50ms",
        about: "Tokyo–Virginia: 150 ms RTT; California–Singapore is 170. Loss as at the evening \
                peak.",
    },
    Rung {
        name: "antipodes",
        link: "delay 140ms 2ms rate 100mbit loss 1% limit 100ms",
        about: "Sydney–London: 270–280 ms RTT, several carriers in between.",
    },
    Rung {
        name: "lossy-wan",
        link: "delay 50ms rate 200mbit loss 1% limit 50ms",
        about: "100 ms, 1 %: the cell at which TCP cubic falls to one per cent of the link. The \
                reference of the benchmarks.",
    },
    Rung {
        name: "bursty-wan",
        link: "delay 50ms rate 200mbit loss gemodel 0.2525% 25% limit 50ms",
        about: "The same mean loss of 1 % in bursts of four packets on average (Gilbert's model: \
                p/(p+r) = 1 %, 1/r = 4), as a congested peering shows it.",
    },
    Rung {
        name: "shallow",
        link: "delay 50ms rate 200mbit limit 5ms",
        about: "A policer or a switch with a small buffer at the end of a long path: 125 KB of queue \
                for 2.5 MB in flight.",
    },
    Rung {
        name: "bloated",
        link: "delay 25ms rate 50mbit limit 500ms",
        about: "A modem or base station with half a second of buffer (bufferbloat).",
    },
    Rung {
        name: "cable",
        link: "delay 10ms 1ms loss 0.05% limit 100ms; forward rate 40mbit; back rate 400mbit",
        about: "A cable modem at the near end: ten times less up than down, 100 ms of buffer.",
    },
    Rung {
        name: "satellite",
        link: "delay 275ms 5ms rate 50mbit loss 0.5% limit 200ms",
        about: "A geostationary satellite: 35 786 km four times are 477 ms, with terminals and \
                gateways 550 ms RTT.",
    },
    Rung {
        name: "leo-satellite",
        link: "delay 20ms 5ms distribution normal rate 100mbit loss gemodel 0.3% 30% limit 60ms",
        about: "Low-orbit satellites: 40 ms RTT with jitter, 1 % loss in bursts at hand-overs.",
    },
    Rung {
        name: "good-4g",
        link: "delay 25ms 5ms distribution normal loss 0.1% limit 150ms; forward rate 20mbit; \
               back rate 60mbit",
        about: "LTE with a good signal: 50 ms RTT, deep queues at the base station, retransmission \
                by the radio makes jitter out of loss.",
    },
    Rung {
        name: "bad-4g",
        link: "delay 50ms 15ms distribution paretonormal loss gemodel 0.8% 40% slot 2ms 10ms \
               limit 300ms; forward rate 5mbit; back rate 12mbit",
        about: "LTE at the edge of a cell: 100 ms RTT and more, bursts of 2–10 ms (the radio's \
                scheduling), 2 % loss in short bursts, deep queues.",
    },
    Rung {
        name: "flaky",
        link: "delay 40ms 2ms rate 100mbit loss 1% limit 50ms; at 5s rate 25mbit; at 10s down; \
               at 13s up; at 15s rate 100mbit; at 20s loss 5%; at 25s loss 1%",
        about: "A link that degrades, is cut for three seconds, and comes back: for trying out what \
                survives.",
    },
];

/// The rung of that name.
pub fn find(name: &str) -> Option<&'static Rung> {
    LADDER.iter().find(|rung| rung.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rung_is_a_link() {
        for rung in LADDER {
            let spec: LinkSpec = rung.link.parse().unwrap();
            assert_eq!(spec, rung.spec());
            assert_ne!(spec, LinkSpec::default(), "{}", rung.name);
            assert!(rung.about.len() > 40);
        }
    }

    #[test]
    fn names_are_one_word_and_unique() {
        for (index, rung) in LADDER.iter().enumerate() {
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            assert!(rung.name.chars().all(plain), "{}", rung.name);
            assert!(LADDER[..index].iter().all(|other| other.name != rung.name));
        }
    }
}
