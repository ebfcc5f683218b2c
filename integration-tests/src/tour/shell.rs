//! Runs the lines of the tour as a person would type them, and writes down what came out.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};

use crate::{Cluster, netns, paths};

/// No command of the tour takes longer: a guest without KVM boots in two minutes on a busy machine.
const LIMIT: Duration = Duration::from_secs(600);
/// How often to look whether a command has ended.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// No output that is written down is longer; what a tour shows should fit on a page.
const MAX_OUTPUT: usize = 16 << 10;

/// Somebody at a terminal.
pub(super) struct Shell {
    namespace: String,
    home: PathBuf,
    environment: Vec<(String, String)>,
    body: String,
    behind: Vec<(String, Child)>,
}

impl Drop for Shell {
    fn drop(&mut self) {
        // The tour has failed if one is left.
        for (_, child) in &mut self.behind {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What was typed and what came out, as Markdown.
#[derive(Clone, Debug)]
pub struct Transcript(String);

impl Transcript {
    /// The whole document.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.0
    }
}

/// The lines that were typed in a document: what must not differ from one run to the next.
#[must_use]
pub fn commands(document: &str) -> Vec<&str> {
    document.lines().filter(|line| line.starts_with("$ ")).collect()
}

impl Shell {
    pub(super) fn new(cluster: &Cluster, home: &Path, images: &str) -> anyhow::Result<Self> {
        let path = std::env::var("PATH").unwrap_or_default();
        let path = format!("{}:{path}", paths::binary_dir()?.display());
        let environment = [("PATH", path.as_str()), ("IMAGES", images), ("UNCLOUD_ENDPOINTS", cluster.api.endpoint())];
        let environment = environment.map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec();
        let namespace = super::seat(cluster)?;
        Ok(Self { namespace, home: home.to_owned(), environment, body: String::new(), behind: Vec::new() })
    }

    /// Gives a variable a value from now on. For what differs from run to run and must stand in a line.
    pub(super) fn set(&mut self, name: &str, value: &str) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// A paragraph for the reader.
    pub(super) fn say(&mut self, text: &str) {
        eprintln!("# {text}");
        self.body.push_str(&format!("\n{text}\n"));
    }

    /// Types a line; gives what it printed as its result. What it says about its progress is not written down.
    pub(super) async fn run(&mut self, line: &str) -> anyhow::Result<String> {
        eprintln!("$ {line}");
        let begin = Instant::now();
        let out = self.attempt(line).await?;
        eprintln!("{out}({:.1?})", begin.elapsed());
        self.write(line, &out);
        Ok(out)
    }

    async fn attempt(&self, line: &str) -> anyhow::Result<String> {
        let child = self.command(line).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true).spawn()?;
        let output = tokio::time::timeout(LIMIT, child.wait_with_output())
            .await
            .with_context(|| format!("`{line}` did not end within {LIMIT:?}"))??;
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "`{line}` ended with {}\n{out}{err}", output.status);
        Ok(out.into_owned())
    }

    /// Types a line again and again until it succeeds and says this; only that is written down. For what a person would try again,
    /// such as a login to a guest that boots.
    pub(super) async fn run_until(&mut self, line: &str, says: &str, limit: Duration) -> anyhow::Result<String> {
        eprintln!("$ {line}");
        let begin = Instant::now();
        let out = loop {
            let other = match self.attempt(line).await {
                Ok(out) if out.contains(says) => break out,
                Ok(out) => anyhow::anyhow!("`{line}` does not say `{says}`, but\n{out}"),
                Err(error) => error,
            };
            ensure!(begin.elapsed() <= limit, "not within {limit:?}: {other:#}");
            // What fails at once is not asked all the time.
            tokio::time::sleep(Duration::from_secs(1)).await;
        };
        eprintln!("{out}(after {:.1?})", begin.elapsed());
        self.write(line, &out);
        Ok(out)
    }

    /// Types a line that goes on behind the next ones. It must end with ` &`.
    pub(super) fn behind(&mut self, line: &str) -> anyhow::Result<()> {
        eprintln!("$ {line}");
        let alone = line.strip_suffix(" &").context("a line that goes on ends with ` &`")?;
        let mut command = netns::command(&self.namespace, "bash");
        command.args(["-c", alone]).current_dir(&self.home).envs(self.environment.iter().cloned());
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit()).spawn()?;
        self.behind.push((alone.to_owned(), child));
        self.write(line, "");
        Ok(())
    }

    /// Waits for what was begun by [`Self::behind`].
    pub(super) async fn wait(&mut self) -> anyhow::Result<()> {
        let begin = Instant::now();
        for (line, child) in &mut self.behind {
            loop {
                match child.try_wait()? {
                    Some(status) if status.success() => break,
                    Some(status) => bail!("`{line}` ended with {status}"),
                    None if begin.elapsed() > LIMIT => bail!("`{line}` did not end"),
                    None => tokio::time::sleep(LOOK_EVERY).await,
                }
            }
        }
        self.behind.clear();
        self.write("wait", "");
        Ok(())
    }

    /// A file in the directory in which all is typed.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.home.join(name)
    }

    /// The document, with what is there before the first command.
    pub(super) fn finish(&self, preface: &str) -> Transcript {
        let mut files = String::new();
        for name in ["web.yaml", "ssh.conf"] {
            let text = std::fs::read_to_string(self.file(name)).unwrap_or_default();
            files.push_str(&format!("`{name}`:\n\n```\n{text}```\n\n"));
        }
        Transcript(format!("{preface}{}\n{}", files.trim_end(), self.body).replace("```\n\n```console\n", ""))
    }

    fn command(&self, line: &str) -> tokio::process::Command {
        let mut command = netns::command(&self.namespace, "bash");
        command.args(["-c", line]).current_dir(&self.home).envs(self.environment.iter().cloned()).stdin(Stdio::null());
        Command::into(command)
    }

    fn write(&mut self, line: &str, out: &str) {
        let end = out.char_indices().map(|(at, _)| at).take_while(|at| *at <= MAX_OUTPUT).last().unwrap_or(0);
        let out = if out.len() > MAX_OUTPUT { &out[..end] } else { out };
        let images = self.environment.iter().find(|(k, _)| k == "IMAGES").map_or("", |(_, v)| v.as_str());
        let mut text: String = out.replace(images, "$IMAGES").lines().map(|l| format!("{}\n", l.trim_end())).collect();
        // Whoever reads the document as commands must not take output for them.
        if text.starts_with("$ ") {
            text.insert(0, ' ');
        }
        self.body.push_str(&format!("\n```console\n$ {line}\n{text}```\n"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_of_a_document_are_found() {
        let document = "# A tour\n\n```console\n$ uncloud status\nall is well\n```\nWe pay in $ and more\n```console\n$ wait\n```\n";
        assert_eq!(commands(document), ["$ uncloud status", "$ wait"]);
    }
}
