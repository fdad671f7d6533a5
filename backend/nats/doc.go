// Package nats keeps channels in NATS JetStream.
//
//	conn, err := natsgo.Connect(url, natsgo.MaxReconnects(-1))
//	…
//	ch := dchannel.New("my-channel", nats.New(conn))
//
// A namespace is one stream, a channel is one subject in it, and its messages are the
// log's entries. The stream is made by the first call. Any NATS tool can read it:
//
//	nats stream subjects dchannel
//	nats stream view dchannel --subject 'dchannel.log.my-channel'
//	nats sub 'dchannel.push.>'
//
// A message is one line (epoch, sequence number of the last record, count, ID, ID of
// the entry before, the publisher's clock, m for messages or c for the close marker)
// and the frame. Names are letters, digits, '-' and '_' as they are, other bytes as %XX.
//
// # Delivery
//
// An append is a publish that expects the last message of its subject
// (Nats-Expected-Last-Subject-Sequence). Who was slower reads the end and tries again.
// So the order is the stream's, numbers have no holes, and a publish that the client
// sends late, after a reconnect, cannot count twice. A retry looks for its ID among all
// that has come since the first attempt; if retention no longer has that, the outcome
// is dchannel.ErrForgotten.
//
// The stream publishes every entry again (RePublish) to a second subject, where each
// subscribed channel has one core subscription: no consumer, no goroutine, about 800
// bytes here. NATS drops such pushes when a connection is too slow, so that positions
// are compared every few seconds: one small request while nothing has been appended in the
// namespace, and else one more for every 512 channels. Catching up is by direct get.
//
// An acknowledged append is in the server's memory or page cache, not on its disk: the
// server syncs every two minutes (sync_interval). A killed server process loses nothing; a
// machine that loses power can lose the newest entries. "sync_interval: always", or a
// stream with three replicas on different machines, closes that.
//
// # Close marker
//
// It is the log's last message. Its header Dchannel-Keep says how long it counts from
// the server's timestamp; the server's clock is read with each connect. The message and
// those below it go later, by their own time to live, or with the next log of that name.
// Entries live for retention and idle expiry together (by default 24 hours and 10 minutes)
// from their own time on: a marker that is kept longer stands alone in the end.
//
// # Locks
//
// [Backend] is a [dchannel.Locker]. A lock is a subject of the same stream,
// dchannel.log.lock:<channel>, and its last message is its state: one line of JSON with the
// newest generation, whether it is held, and how the last ones ended. Every step is a
// publish that expects the last message of the subject. The stream, its settings and the
// permissions are those of the logs.
//
// Promised: there is one holder by the server's clock, every generation ends once, and a call
// that is repeated does nothing twice. A hold counts from the server's timestamp of its message, in
// milliseconds, and no client's clock is used: the clock is that of the stream's leader, read by
// STREAM.INFO with each look at the lock. A message that extends or ends a hold says when that
// was over; taken later, it is void, and the generation has expired. All who read it judge alike, also
// when it was late on its way. Nothing has to happen at the server when a hold is over, and nobody
// has to write it down: the next generation does.
//
// The server's own times to live (Nats-TTL) are not what ends a hold: they are whole seconds, and what goes
// leaves no trace of its fence. They are what ends the memory, a day after the generation's time.
//
// Fences are the last one and 1, or the server's time in microseconds if that is more, so they grow over
// a purge, another stream and [Backend.Remove] too, unless the server's clock went back. Acquire looks for
// the log's end behind its own message: the stream's numbers tell which was first, and a generation
// that began behind a close marker ends at once, as closed. Others may see it held for that moment.
//
// [Backend.WatchLock] is one core subscription. Expiry is not hinted: wait for Remaining. A push that was
// lost is found when positions are compared.
//
// Not promised: lines. Acquire with Lease.Fair returns errors.ErrUnsupported. In a cluster, a leader whose clock
// differs from the one's before moves the end of a hold by as much. A holder that was paused longer than
// its time does not know it: what the lock protects has to check the fence, on reading and on writing. Who
// may publish to dchannel.log.* can end any lock.
//
// Acquire takes three trips if it succeeds and one if not, Extend and Release three. Who takes a step has
// old records deleted now and then, one in 64, which needs the permission to purge; without it
// they stay for their day, at most as many as the stream keeps of a subject.
//
// # Reconnect
//
// The connection's handlers stay the user's. After a reconnect, and a ping that the
// server has answered, every subscription is told to compare positions. What was under
// way when the connection broke is dchannel.ErrUncertain (nats.go itself would wait for the
// answer for ever). While there is no connection, calls return dchannel.ErrUnavailable at
// once.
//
// Every 5 seconds a ping has to be answered within 3 ([WithProbe]); otherwise the connection
// is made anew. Without that, nats.go takes four to six minutes to see that a peer is gone.
// On such a connection, a write that fills the system's buffer holds the client's lock until
// nats.FlusherTimeout, a minute by default, and so delays the reconnect (but no caller): set it
// to a few seconds if frames are large.
//
// Connect with nats.MaxReconnects(-1): a connection that gives up is refused. One that is
// closed, by its owner or because the server refused the credentials twice in a row
// (see nats.IgnoreAuthErrorAbort), fails everything with dchannel.ErrBackendClosed.
//
// # Limits
//
// A frame is at most the server's max_payload less 512 bytes ([Backend.MaxFrame]).
// The stream keeps the last 16,384 appends of a channel and one more ([WithRetention]); this
// number is the stream's, and all backends of a namespace must agree on it. Times to live are
// whole seconds, rounded up. Bytes have no limit unless an operator sets the stream's
// max_bytes: then appends beyond it are dchannel.ErrRefused, as dropping the oldest
// messages could drop a close marker.
//
// A stream with other settings than this package makes is refused with
// dchannel.ErrInvalidOption, naming each. Replicas (unless [WithReplicas] is given),
// placement, compression and max_bytes are the operator's.
//
// With permissions, this is enough for a namespace "dchannel" (CREATE only for who may make
// the stream; PURGE for Remove, and for deleting what is older than the retention):
//
//	publish:   dchannel.log.*  dchannel.meta.*
//	           $JS.API.STREAM.INFO.dchannel  $JS.API.STREAM.CREATE.dchannel
//	           $JS.API.STREAM.PURGE.dchannel  $JS.API.DIRECT.GET.dchannel
//	subscribe: dchannel.push.*  _INBOX.>
//
// dchannel.push.* must not be published to by clients, and who may publish to
// dchannel.log.* can write what looks like an entry. Foreign messages there are stepped over.
//
// # Cluster
//
// [WithReplicas] keeps the stream on 3 or 5 servers. An append is acknowledged by a
// majority and survives a server; during an election calls fail with
// dchannel.ErrUnavailable or ErrUncertain. Any replica answers a read, and one that is behind
// what this process knows already is asked again. JetStream must be in the connection's own
// domain.
//
// # Server versions
//
// Tested with nats-server 2.15.2. Times to live of messages and batches of direct gets need
// 2.11 at least. JetStream must be enabled.
package nats
