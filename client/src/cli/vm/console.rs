//! `uncloud vm console`: the terminal here and the serial line of the guest.

use std::{
    io::{IsTerminal as _, Stdin, stdin},
    sync::Arc,
};

use clap::Args;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::{
    io::AsyncReadExt as _,
    sync::{Notify, mpsc},
};
use uncloud_proto::v1::{self, console_request::Message};

use super::{
    super::{Context, Error, Signals},
    escape::Escape,
};
use crate::{output, units};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Name, UUID or unique prefix of one.
    vm: String,
    /// How much of what the guest wrote before is shown first.
    #[arg(long, value_name = "BYTES", default_value = "4K", value_parser = units::parse_bytes)]
    history: u32,
}

/// How the session ended.
enum End {
    Detached,
    Closed,
    Signal(&'static str),
}

pub(crate) async fn run(context: &Context, a: Arguments) -> Result<(), Error> {
    let vm = a.vm.clone();
    let open = v1::ConsoleOpen { vm: a.vm, owner: context.owner.clone(), history_bytes: a.history };
    let mut console = context.client.console(open).await?;
    let mut signals = Signals::take()?;
    let is_terminal = stdin().is_terminal();
    if is_terminal {
        output::note(&format!("Connected to {}. Ctrl-] and then `.` or `q` leaves.", output::clean(&vm)));
    }
    // Restored when it goes out of scope: at every way out, and when something panics.
    let raw = if is_terminal { Some(RawTerminal::enter()?) } else { None };
    let detached = Arc::new(Notify::new());
    let escape = is_terminal.then(Escape::default);
    // Without its sender the server would take the console for closed by us.
    let keep_open = console.input.clone();
    tokio::spawn(type_into(console.input, escape, Arc::clone(&detached)));

    let end = loop {
        tokio::select! {
            biased;
            name = signals.next() => break Ok(End::Signal(name)),
            () = detached.notified() => break Ok(End::Detached),
            message = console.output.message() => match message {
                Ok(Some(piece)) => {
                    if let Err(e) = output::print_raw(&piece.output) {
                        break Err(e.into());
                    }
                }
                Ok(None) => break Ok(End::Closed),
                Err(status) => break Err(Error::from(status)),
            },
        }
    };
    drop(keep_open);
    drop(raw);
    match end? {
        End::Detached => output::note("\nDetached; the VM goes on."),
        End::Closed => output::note("\nThe console was closed: the VM does not run here any more."),
        End::Signal(name) => output::note(&format!("\nDetached by {name}; the VM goes on.")),
    }
    Ok(())
}

/// Sends what is typed until the user leaves. At the end of a file that is piped in, the output goes on.
async fn type_into(to: mpsc::Sender<v1::ConsoleRequest>, mut escape: Option<Escape>, detach: Arc<Notify>) {
    let mut keys = tokio::io::stdin();
    let mut buffer = [0; 4096];
    while let Ok(n @ 1..) = keys.read(&mut buffer).await {
        let (send, leave) = match &mut escape {
            Some(escape) => {
                let typed = escape.feed(&buffer[..n]);
                (typed.send, typed.detach)
            }
            None => (buffer[..n].to_vec(), false),
        };
        if !send.is_empty() && to.send(v1::ConsoleRequest { message: Some(Message::Input(send)) }).await.is_err() {
            return;
        }
        if leave {
            detach.notify_one();
            return;
        }
    }
}

/// The terminal without line editing, echo and signals of its own; as it was again when this is dropped.
struct RawTerminal {
    stdin: Stdin,
    before: Termios,
}

impl RawTerminal {
    fn enter() -> Result<Self, Error> {
        let failed = |e: rustix::io::Errno| Error::Failed(format!("cannot set up the terminal: {e}"));
        let stdin = stdin();
        let before = tcgetattr(&stdin).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw).map_err(failed)?;
        Ok(Self { stdin, before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Drains first, so that the last of the guest's output is not treated anew.
        let _ = tcsetattr(&self.stdin, OptionalActions::Drain, &self.before);
    }
}
