//! What the operator wants done with each disk: `--disk NAME=skip|copy|FRACTION`.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// Stands for every disk that is not named.
const ALL: &str = "all";

/// What is done with one disk.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum DiskTreatment {
    /// It moves, in the phases that the session plans for disks.
    #[default]
    Move,
    /// It moves, and this share of it (0 to 1) before the guest runs at the destination; 1 is all of it.
    Fraction(f64),
    /// It does not move: it lies on storage that both hosts reach.
    Skip,
}

/// The operator's word on one disk.
#[derive(Clone, Debug, PartialEq)]
pub struct DiskOption {
    /// The disk, or `all`.
    pub name: String,
    /// What is done with it.
    pub treatment: DiskTreatment,
}

impl FromStr for DiskOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "'{text}' is not NAME=WHAT: WHAT is skip (shared storage), copy (all of it before \
                 the guest resumes) or a fraction from 0 to 1; NAME is a disk as `hybridmig check` \
                 names it, or all"
            )
        };
        // A node's name may hold '=': what comes after the last one never does.
        let (name, what) = text.rsplit_once('=').ok_or_else(wrong)?;
        let treatment = match what {
            "skip" => DiskTreatment::Skip,
            "copy" => DiskTreatment::Fraction(1.0),
            number => number
                .parse()
                .ok()
                .filter(|fraction| (0.0..=1.0).contains(fraction))
                .map(DiskTreatment::Fraction)
                .ok_or_else(wrong)?,
        };
        if name.is_empty() {
            return Err(wrong());
        }
        Ok(Self {
            name: name.to_owned(),
            treatment,
        })
    }
}

impl fmt::Display for DiskOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.treatment {
            DiskTreatment::Move => write!(f, "{}", self.name),
            DiskTreatment::Skip => write!(f, "{}=skip", self.name),
            DiskTreatment::Fraction(1.0) => write!(f, "{}=copy", self.name),
            DiskTreatment::Fraction(fraction) => write!(f, "{}={fraction}", self.name),
        }
    }
}

/// What is done with every disk. By default all that the guest can write move.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DiskChoice {
    named: BTreeMap<String, DiskTreatment>,
    others: DiskTreatment,
}

impl DiskChoice {
    /// No disk moves.
    pub fn none() -> Self {
        Self {
            others: DiskTreatment::Skip,
            ..Self::default()
        }
    }

    /// What is done with the disk of this name.
    pub fn of(&self, name: &str) -> DiskTreatment {
        self.named.get(name).copied().unwrap_or(self.others)
    }

    /// The shares of single disks that were asked for, and that of all others.
    pub fn fractions(&self) -> (BTreeMap<String, f64>, Option<f64>) {
        let fraction = |treatment: &DiskTreatment| match treatment {
            DiskTreatment::Fraction(fraction) => Some(*fraction),
            DiskTreatment::Move | DiskTreatment::Skip => None,
        };
        let named = self.named.iter();
        (
            named
                .filter_map(|(name, treatment)| Some((name.clone(), fraction(treatment)?)))
                .collect(),
            fraction(&self.others),
        )
    }

    /// The disks that were named.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.named.keys().map(String::as_str)
    }
}

/// A later word on the same disk replaces an earlier one.
impl FromIterator<DiskOption> for DiskChoice {
    fn from_iter<I: IntoIterator<Item = DiskOption>>(options: I) -> Self {
        let mut choice = Self::default();
        for option in options {
            if option.name == ALL {
                choice.others = option.treatment;
            } else {
                choice.named.insert(option.name, option.treatment);
            }
        }
        choice
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(words: &[&str]) -> DiskChoice {
        words
            .iter()
            .map(|word| word.parse::<DiskOption>().unwrap())
            .collect()
    }

    #[test]
    fn nothing_said_moves_everything() {
        assert_eq!(DiskChoice::default().of("any"), DiskTreatment::Move);
        assert_eq!(DiskChoice::none().of("any"), DiskTreatment::Skip);
    }

    #[test]
    fn a_named_disk_goes_before_all() {
        let choice = choice(&["all=skip", "root=0.25", "data=copy", "root=0.5"]);
        assert_eq!(choice.of("root"), DiskTreatment::Fraction(0.5));
        assert_eq!(choice.of("data"), DiskTreatment::Fraction(1.0));
        assert_eq!(choice.of("scratch"), DiskTreatment::Skip);
        assert_eq!(choice.names().collect::<Vec<_>>(), ["data", "root"]);
    }

    #[test]
    fn what_is_no_choice_is_refused_with_what_is() {
        for bad in [
            "root",
            "=skip",
            "root=",
            "root=1.5",
            "root=-0.1",
            "root=NaN",
            "root=move it",
        ] {
            let error = bad.parse::<DiskOption>().unwrap_err();
            assert!(error.contains("skip") && error.contains(bad), "{error}");
        }
    }

    #[test]
    fn a_choice_reads_back_as_it_was_written() {
        for text in ["root=skip", "a=b=copy", "root=0.25", "root=0"] {
            assert_eq!(text.parse::<DiskOption>().unwrap().to_string(), text);
        }
    }
}
