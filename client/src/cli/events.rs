//! `uncloud events`.

use clap::Args;
use uncloud_proto::v1::{self, watch_events_response::Step as Kind};

use super::{Context, Error};
use crate::{output, watch::Step};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Only events of this VM, host or image (name, UUID or unique prefix of one).
    subject: Option<String>,
    /// Shows up to 100 of the newest, then goes on with new ones until Ctrl-C.
    #[arg(short, long)]
    follow: bool,
    /// How many of the newest events at the most, up to 1000.
    #[arg(short = 'n', long, conflicts_with = "follow", default_value = "100", value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
    /// With --follow: only events after this revision.
    #[arg(long, requires = "follow", default_value = "0", hide_default_value = true, value_name = "REVISION",
          value_parser = clap::value_parser!(i64).range(0..))]
    from_revision: i64,
}

pub(crate) async fn run(context: &Context, arguments: Arguments) -> Result<(), Error> {
    let (subject, owner) = (arguments.subject.unwrap_or_default(), context.owner.clone());
    if !arguments.follow {
        let request = v1::ListEventsRequest { subject, owner, limit: arguments.limit };
        let answer = context.client.list_events(request).await?;
        // The newest last, where people look.
        return context.print(&answer, |a| output::events(a.events.iter().rev()));
    }
    let request = v1::WatchEventsRequest { subject, owner, from_revision: arguments.from_revision };
    let mut watch = context.client.watch_events(request);
    loop {
        match watch.next().await? {
            Step::Restarted => output::note("events may be missing or repeated here: the watch began anew"),
            Step::Answer(answer) => context.print_step(&answer, |a| match &a.step {
                Some(Kind::Event(event)) => Some(output::event_line(event)),
                Some(Kind::Bookmark(_)) | None => None,
            })?,
        }
    }
}
