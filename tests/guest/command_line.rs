//! What the kernel command line tells a program in the test guest: words `PROGRAM.NAME=VALUE`.

use std::str::FromStr;

/// The words of one program.
pub struct CommandLine {
    line: String,
    program: &'static str,
}

impl CommandLine {
    /// Reads those of this program.
    pub fn of(program: &'static str) -> Self {
        let line = std::fs::read_to_string("/proc/cmdline").expect("/proc is mounted");
        Self { line, program }
    }

    /// The value of this name, if there is one.
    pub fn find(&self, name: &str) -> Option<&str> {
        let prefix = format!("{}.{name}=", self.program);
        self.line
            .split_whitespace()
            .find_map(|word| word.strip_prefix(&prefix))
    }

    /// The same as a number.
    pub fn value<T: FromStr>(&self, name: &str, default: T) -> T {
        self.find(name).map_or(default, |text| {
            let value = text.parse().ok();
            value.unwrap_or_else(|| panic!("{}.{name}={text} cannot be read", self.program))
        })
    }
}
