package nats

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	natsgo "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/dchannel/dchannel"
)

// attempt is one try to get ready, shared by everyone who waits for it.
type attempt struct {
	done chan struct{}
	err  error
}

// ready returns when the goroutines run, the connection is up, and the stream is
// there as it should be. After the first time it costs next to nothing.
func (b *Backend) ready(ctx context.Context) error {
	if err := b.isClosed(); err != nil {
		return err
	}
	if b.opt.err != nil {
		return b.opt.err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if b.verified.Load() {
		return nil
	}
	b.startMu.Lock()
	if err := b.isClosed(); err != nil {
		b.startMu.Unlock()
		return err
	}
	if !b.running {
		b.running = true
		b.run()
	}
	a := b.starting
	if a == nil {
		a = &attempt{done: make(chan struct{})}
		b.starting = a
		b.work.Go(func() {
			a.err = b.prepare()
			b.startMu.Lock()
			b.starting = nil
			b.startMu.Unlock()
			close(a.done)
		})
	}
	b.startMu.Unlock()
	select {
	case <-a.done:
		return a.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// prepare is one attempt. It runs for everyone, and so under nobody's context.
func (b *Backend) prepare() error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*answerTimeout)
	defer cancel()
	select {
	case <-b.looked:
	case <-b.closed:
	case <-ctx.Done():
	}
	life := b.life.Load()
	err := b.wire.isDown()
	if err == nil {
		err = b.stream(ctx)
	}
	if err == nil {
		err = b.memorize(ctx)
	}
	if closed := b.isClosed(); closed != nil {
		return closed
	}
	if errors.Is(err, context.DeadlineExceeded) {
		err = errNoAnswer // ours, not the caller's
	}
	if streamMissing(err) {
		err = fmt.Errorf("%w: no JetStream on this connection (is it enabled, and has the stream a leader?): %w", dchannel.ErrUnavailable, err)
	}
	if err == nil && life == b.life.Load() {
		b.verified.Store(true)
	}
	return mapError(err, false)
}

// config is the stream as it should be.
func (b *Backend) config() jetstream.StreamConfig {
	return jetstream.StreamConfig{
		Name: b.names.stream,
		Description: "dchannel: the logs of distributed channels. " +
			"One subject a channel; its last message is the channel's bookkeeping.",
		Subjects:          []string{b.names.log + "*", b.names.incarnation, b.names.removed},
		Retention:         jetstream.LimitsPolicy,
		MaxConsumers:      -1,
		MaxMsgs:           -1,
		MaxBytes:          -1,
		MaxMsgsPerSubject: int64(b.opt.messages) + 1, // one more: the close marker takes nobody's place
		MaxMsgSize:        -1,
		// New messages are refused, should an operator set a limit: the oldest of
		// the stream may be the close marker of a channel.
		Discard:     jetstream.DiscardNew,
		Storage:     b.opt.storage,
		Replicas:    max(1, b.opt.replicas),
		AllowDirect: true,
		AllowMsgTTL: true,
		RePublish:   &jetstream.RePublish{Source: b.names.log + "*", Destination: b.names.push + "{{wildcard(1)}}"},
	}
}

// differences names what keeps a stream from being used. Settings that are not
// named (compression, placement, a limit of bytes, …) are the operator's.
func differences(have, want jetstream.StreamConfig, replicas int) (diffs []string) {
	check := func(name string, have, want any) {
		if have != want {
			diffs = append(diffs, fmt.Sprintf("%s is %v, want %v", name, have, want))
		}
	}
	subjects := func(s []string) string {
		s = slices.Clone(s)
		slices.Sort(s)
		return strings.Join(s, " ")
	}
	check("subjects", subjects(have.Subjects), subjects(want.Subjects))
	check("retention", have.Retention, want.Retention)
	check("max_msgs", have.MaxMsgs, want.MaxMsgs)
	check("max_msgs_per_subject (WithRetention's messages and 1)", have.MaxMsgsPerSubject, want.MaxMsgsPerSubject)
	check("max_msg_size", have.MaxMsgSize, want.MaxMsgSize)
	check("max_age", have.MaxAge, want.MaxAge)
	check("discard", have.Discard, want.Discard)
	check("discard_new_per_subject", have.DiscardNewPerSubject, false)
	check("storage (WithStorage)", have.Storage, want.Storage)
	if replicas > 0 {
		check("num_replicas (WithReplicas)", have.Replicas, replicas)
	}
	check("no_ack", have.NoAck, false)
	check("sealed", have.Sealed, false)
	check("deny_purge", have.DenyPurge, false)
	check("allow_direct", have.AllowDirect, true)
	check("allow_msg_ttl", have.AllowMsgTTL, true)
	check("subject_delete_marker_ttl", have.SubjectDeleteMarkerTTL, time.Duration(0))
	check("mirror", have.Mirror != nil, false)
	check("sources", len(have.Sources), 0)
	check("subject_transform", have.SubjectTransform != nil, false)
	republish := func(r *jetstream.RePublish) string {
		if r == nil {
			return "none"
		}
		if r.HeadersOnly {
			return r.Source + " → " + r.Destination + " (headers only)"
		}
		return r.Source + " → " + r.Destination
	}
	check("republish", republish(have.RePublish), republish(want.RePublish))
	return diffs
}

// stream makes sure that there is one, as it should be.
func (b *Backend) stream(ctx context.Context) error {
	want := b.config()
	info, err := b.streamCall(ctx, "INFO", nil)
	if err != nil && isCode(err, codeStreamNotFound) {
		info, err = b.streamCall(ctx, "CREATE", want)
		if err != nil && isCode(err, codeStreamNameInUse) { // another process was faster, and wants other settings
			info, err = b.streamCall(ctx, "INFO", nil)
		}
	}
	if err != nil {
		return err
	}
	if diffs := differences(info.Config, want, b.opt.replicas); len(diffs) > 0 {
		return fmt.Errorf("%w: nats: stream %q cannot be used: %s", dchannel.ErrInvalidOption, want.Name, strings.Join(diffs, "; "))
	}
	b.memory.setReplicas(info.Config.Replicas)
	return nil
}

// streamCall asks JetStream's management API. Every answer tells the server's time.
func (b *Backend) streamCall(ctx context.Context, verb string, body any) (*jetstream.StreamInfo, error) {
	m := natsgo.NewMsg("$JS.API.STREAM." + verb + "." + b.names.stream)
	if body != nil {
		var err error
		if m.Data, err = json.Marshal(body); err != nil {
			return nil, err
		}
	}
	asked := time.Now()
	answers, _, err := b.wire.roundTrip(ctx, m, one)
	if err != nil {
		return nil, err
	}
	var answer struct {
		Error *apiError `json:"error"`
		jetstream.StreamInfo
	}
	if err := json.Unmarshal(answers[0].Data, &answer); err != nil {
		return nil, fmt.Errorf("%w: nats: an answer that is not JSON: %w", dchannel.ErrUnavailable, err)
	}
	if answer.Error != nil {
		return nil, answer.Error
	}
	if !answer.TimeStamp.IsZero() {
		half := time.Since(asked) / 2
		b.clock.Store(&clock{here: asked.Add(half), there: answer.TimeStamp})
	}
	return &answer.StreamInfo, nil
}

func isCode(err error, code int) bool {
	var api *apiError
	return errors.As(err, &api) && api.ErrCode == code
}

// clock is the server's, as seen from here: one moment on both. Between two looks
// it goes on by this process's monotonic clock.
type clock struct{ here, there time.Time }

// now is the time by the server's clock.
func (b *Backend) now() time.Time {
	c := b.clock.Load()
	if c == nil {
		return time.Now()
	}
	return c.there.Add(time.Since(c.here))
}
