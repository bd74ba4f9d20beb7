//! What a guest process is told to be, as a structure and as command line arguments. The names of
//! the arguments stand here only: who starts a guest and the guest itself share them.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use super::disk;
use super::pages::PAGE;
use super::process::GuestProcessError;
use super::profile::{ContentShares, Profile};
use super::stats::MAX_THREADS;
use super::workers::Plan;

/// Smallest memory of a guest in bytes.
pub const MIN_BYTES: u64 = 16 << 20;
/// Largest memory of a guest in bytes.
pub const MAX_BYTES: u64 = 8 << 30;

/// What a guest is to be.
#[derive(Clone, Debug, PartialEq)]
pub struct GuestOptions {
    /// Path of the control socket. A socket that nobody listens on any more is replaced.
    pub control: PathBuf,
    /// Size of the memory, [`MIN_BYTES`] to [`MAX_BYTES`], whole pages.
    pub bytes: u64,
    /// Size of the disk, whole blocks of 64 KiB from [`super::MIN_DISK_BYTES`] to
    /// [`super::MAX_DISK_BYTES`], at most 128 times the memory; 0: no disk.
    pub disk_bytes: u64,
    /// The file that is the disk, made when the guest starts and removed when it ends. It may be there
    /// if it is empty. Unless told otherwise it lies beside the control socket, with `.disk` behind
    /// its name, and is replaced if it is there.
    pub disk: Option<PathBuf>,
    /// Wait for the state of a guest that comes from elsewhere. What follows up to `max_accesses`
    /// then comes with the state.
    pub incoming: bool,
    /// Access pattern.
    pub profile: Profile,
    /// What the pages are filled with; the profile's mix if none.
    pub contents: Option<ContentShares>,
    /// Decides all contents and accesses.
    pub seed: u64,
    /// Number of workers, 1 to [`MAX_THREADS`].
    pub threads: u32,
    /// Multiplies the profile's rates; 0 means as fast as possible.
    pub rate_factor: f64,
    /// Each worker rests for good after this many accesses.
    pub max_accesses: Option<u64>,
    /// Become the leader of a new session, so that signals to the starter's terminal or process
    /// group do not reach the guest.
    pub detach: bool,
    /// End when the process with this id has ended.
    pub die_with: Option<u32>,
    /// End when no control connection is left (or none comes for a minute) and the guest is
    /// incoming and has never been given a state. Once it has one it may own the only copy of what
    /// the guest was, and is ended by request only.
    pub end_when_abandoned: bool,
}

impl GuestOptions {
    /// A guest of `bytes` bytes at a control socket, everything else as usual: no disk, profile `web`,
    /// seed 1, two workers, factor 1, attached to its starter.
    pub fn new(control: impl Into<PathBuf>, bytes: u64) -> Self {
        Self {
            control: control.into(),
            bytes,
            disk_bytes: 0,
            disk: None,
            incoming: false,
            profile: Profile::Web,
            contents: None,
            seed: 1,
            threads: 2,
            rate_factor: 1.0,
            max_accesses: None,
            detach: false,
            die_with: None,
            end_when_abandoned: false,
        }
    }

    /// The options as arguments of `hybridmig guest`.
    pub fn to_args(&self) -> Vec<OsString> {
        let mut args = vec!["--control".into(), self.control.clone().into_os_string()];
        let mut add = |name: &str, value: String| args.extend([name.into(), value.into()]);
        add("--size", self.bytes.to_string());
        add("--disk-size", self.disk_bytes.to_string());
        add("--profile", self.profile.to_string());
        add("--seed", self.seed.to_string());
        add("--threads", self.threads.to_string());
        add("--rate-factor", self.rate_factor.to_string());
        if let Some(shares) = self.contents {
            add("--contents", shares.to_string());
        }
        if let Some(count) = self.max_accesses {
            add("--max-accesses", count.to_string());
        }
        if let Some(pid) = self.die_with {
            add("--die-with", pid.to_string());
        }
        if let Some(path) = &self.disk {
            args.extend(["--disk".into(), path.clone().into_os_string()]);
        }
        for (name, given) in [
            ("--incoming", self.incoming),
            ("--detach", self.detach),
            ("--end-when-abandoned", self.end_when_abandoned),
        ] {
            args.extend(given.then(|| name.into()));
        }
        args
    }

    /// Reads what [`Self::to_args`] writes; every argument but `--control` and `--size` may be
    /// left out.
    pub fn from_args(args: impl IntoIterator<Item = OsString>) -> Result<Self, GuestProcessError> {
        let bad = GuestProcessError::Options;
        let mut options = Self::new(PathBuf::new(), 0);
        let mut args = args.into_iter();
        while let Some(name) = args.next() {
            let name = name.to_string_lossy().into_owned();
            match name.as_str() {
                "--incoming" => options.incoming = true,
                "--detach" => options.detach = true,
                "--end-when-abandoned" => options.end_when_abandoned = true,
                "--control" | "--size" | "--profile" | "--seed" | "--threads" | "--rate-factor"
                | "--contents" | "--max-accesses" | "--die-with" | "--disk-size" | "--disk" => {
                    let value = args
                        .next()
                        .ok_or_else(|| bad(format!("{name} needs a value")))?;
                    options
                        .set(&name, &value)
                        .map_err(|why| bad(format!("{name} {}: {why}", value.display())))?;
                }
                _ => return Err(bad(format!("{name} is not an option of a guest"))),
            }
        }
        if options.control.as_os_str().is_empty() {
            return Err(bad("--control is missing".into()));
        }
        options.check()?;
        Ok(options)
    }

    fn set(&mut self, name: &str, value: &OsStr) -> Result<(), String> {
        fn number<T: std::str::FromStr>(text: &str) -> Result<T, String> {
            text.parse().map_err(|_| "not a number in range".into())
        }
        if name == "--control" {
            self.control = value.into();
            return Ok(());
        }
        if name == "--disk" {
            self.disk = Some(value.into());
            return Ok(());
        }
        let text = value.to_str().ok_or("not UTF-8")?;
        match name {
            "--size" => self.bytes = number(text)?,
            "--disk-size" => self.disk_bytes = number(text)?,
            "--profile" => self.profile = text.parse()?,
            "--seed" => self.seed = number(text)?,
            "--threads" => self.threads = number(text)?,
            "--rate-factor" => self.rate_factor = number(text)?,
            "--contents" => self.contents = Some(text.parse()?),
            "--max-accesses" => self.max_accesses = Some(number(text)?),
            "--die-with" => self.die_with = Some(number(text)?),
            _ => return Err("not an option with a value".into()),
        }
        Ok(())
    }

    /// Whether every option is in its range.
    pub fn check(&self) -> Result<(), GuestProcessError> {
        let bad = |what: String| Err(GuestProcessError::Options(what));
        if !(MIN_BYTES..=MAX_BYTES).contains(&self.bytes) {
            return bad(format!(
                "a guest of {} bytes is out of range: 16 MiB to 8 GiB are possible",
                self.bytes
            ));
        }
        if !self.bytes.is_multiple_of(PAGE as u64) {
            return bad(format!("{} bytes are not whole pages of 4 KiB", self.bytes));
        }
        if self.disk_bytes > 0 {
            disk::check_size(self.disk_bytes, self.bytes).or_else(bad)?;
        } else if self.disk.is_some() {
            return bad("a file for the disk is named, and no --disk-size".into());
        }
        self.plan().check().or_else(bad)
    }

    /// The file that is the disk, if the guest has one.
    pub fn disk_path(&self) -> Option<PathBuf> {
        let beside = || {
            let mut path = self.control.clone().into_os_string();
            path.push(".disk");
            path.into()
        };
        (self.disk_bytes > 0).then(|| self.disk.clone().unwrap_or_else(beside))
    }

    /// What a guest that is not incoming does.
    pub fn plan(&self) -> Plan {
        Plan {
            profile: self.profile,
            contents: self.contents.unwrap_or(self.profile.spec().contents),
            seed: self.seed,
            threads: self.threads,
            rate_factor: self.rate_factor,
            max_accesses: self.max_accesses,
        }
    }
}

impl Plan {
    /// Whether the plan, which may come from another host, can be followed.
    pub fn check(&self) -> Result<(), String> {
        if !(1..=MAX_THREADS).contains(&self.threads) {
            return Err(format!(
                "{} workers are out of range: 1 to {MAX_THREADS} are possible",
                self.threads
            ));
        }
        if self.rate_factor != 0.0 && !(1e-6..=1e6).contains(&self.rate_factor) {
            return Err(format!(
                "a rate factor of {} is out of range: 0 (as fast as possible), or 0.000001 to \
                 1000000",
                self.rate_factor
            ));
        }
        if !self.contents.is_sound() {
            return Err("the shares of page contents are more than 100 percent".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_go_round() {
        let plain = GuestOptions::new("/run/guest.sock", MIN_BYTES);
        assert_eq!(GuestOptions::from_args(plain.to_args()).unwrap(), plain);
        let full = GuestOptions {
            disk_bytes: 64 << 20,
            disk: Some("/var/lib/disk".into()),
            incoming: true,
            profile: Profile::Build,
            contents: Some("1:2:3".parse().unwrap()),
            seed: u64::MAX,
            threads: 7,
            rate_factor: 0.125,
            max_accesses: Some(9),
            detach: true,
            die_with: Some(1234),
            end_when_abandoned: true,
            ..plain
        };
        assert_eq!(GuestOptions::from_args(full.to_args()).unwrap(), full);
    }

    #[test]
    fn bad_arguments_are_named() {
        for (args, named) in [
            ("--size 16777216", "--control"),
            ("--control s", "16 MiB"),
            ("--control s --size 16777217", "whole pages"),
            ("--control s --size 9663676416", "8 GiB"),
            ("--control s --size 16777216 --disk-size 1", "4 MiB"),
            ("--control s --size 16777216 --disk-size 4198400", "64 KiB"),
            (
                "--control s --size 16777216 --disk-size 2147549184",
                "128 times",
            ),
            ("--control s --size 16777216 --disk d", "--disk-size"),
            ("--control s --size 16777216 --threads 0", "0 workers"),
            ("--control s --size 16777216 --rate-factor NaN", "NaN"),
            ("--control s --size 16777216 --rate-factor -1", "-1"),
            ("--control s --size 16777216 --rate-factor 1e-9", "factor"),
            ("--control s --size 16777216 --profile x", "profile"),
            ("--control s --size 16777216 --seed", "--seed"),
            ("--control s --size 16777216 --colour red", "--colour"),
        ] {
            let args = args.split(' ').map(OsString::from);
            let error = GuestOptions::from_args(args).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
