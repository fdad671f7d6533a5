package memory_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/memory"
)

func TestCutAndHeal(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	b := memory.New()
	other := b.Store().Backend()
	here, _ := subscribe(t, b, "c")
	there, _ := subscribe(t, other, "c")

	b.Cut(errTest)
	b.Cut(nil)
	require.Equal(t, []string{"interrupted"}, here.told())
	require.Equal(t, []error{errTest}, here.reasons)
	for name, call := range calls(b, "c") {
		err := call(ctx)
		require.ErrorIs(t, err, dchannel.ErrUnavailable, name)
		require.ErrorIs(t, err, errTest, name)
		require.NotErrorIs(t, err, dchannel.ErrUncertain, name)
	}
	_, ok, _ := b.PublishNow("c", frame(""))
	require.False(t, ok)
	publish(t, other, "c", frame("missed"))
	require.Empty(t, here.told())

	b.Heal()
	b.Heal()
	require.Equal(t, []string{"live", "resync"}, here.told())
	require.Len(t, readAll(t, b, "c").Entries, 1, "nothing was done while cut off")
	publish(t, b, "c", frame("again"))
	require.Equal(t, []string{"entry 2-2"}, here.told())
	require.Equal(t, []string{"entry 1-1", "entry 2-2"}, there.told(), "the other process noticed nothing")
}

func TestDropPushes(t *testing.T) {
	t.Parallel()
	b := memory.New()
	c, _ := subscribe(t, b, "c")
	d, _ := subscribe(t, b, "d")
	unharmed, _ := subscribe(t, b.Store().Backend(), "c")
	b.DropPushes(2)
	publish(t, b, "c", frame(""))
	publish(t, b, "d", frame(""))
	publish(t, b, "c", frame(""))
	require.Equal(t, []string{"resync", "entry 2-2"}, c.told())
	require.Equal(t, []string{"resync"}, d.told())
	require.Equal(t, []string{"entry 1-1", "entry 2-2"}, unharmed.told())
}

func TestLoseReplies(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	b := memory.New()
	b.LoseReplies(3)
	f := frame("once")
	_, err := b.Publish(ctx, "c", f)
	require.ErrorIs(t, err, dchannel.ErrUncertain)
	f.Age = time.Second
	_, ok, err := b.PublishNow("c", f)
	require.True(t, ok)
	require.ErrorIs(t, err, dchannel.ErrUncertain)
	require.Len(t, readAll(t, b, "c").Entries, 1)
	_, err = b.MarkClosed(ctx, "c", dchannel.NewID(), time.Minute)
	require.ErrorIs(t, err, dchannel.ErrUncertain)
	require.EqualValues(t, 1, publish(t, b, "c", f).Seq)
	require.True(t, readAll(t, b, "c").Head.Closed)
}

func TestPauseHoldsEveryCall(t *testing.T) {
	t.Parallel()
	for name := range calls(memory.New(), "") {
		for _, end := range []string{"resume", "context", "cut", "close"} {
			synctest.Test(t, func(t *testing.T) {
				b := memory.New()
				b.Store().Pause()
				b.Store().Pause()
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				result := make(chan error, 1)
				go func() { result <- calls(b, "c")[name](ctx) }()
				time.Sleep(time.Hour)
				require.Empty(t, result, name)
				require.Zero(t, b.Store().Calls())

				sentinel := dchannel.ErrUnavailable
				switch end {
				case "resume":
					b.Store().Resume()
					b.Store().Resume()
					require.NoError(t, <-result, name)
					require.EqualValues(t, 1, b.Store().Calls())
					return
				case "context":
					cancel()
					sentinel = context.Canceled
				case "cut":
					b.Cut(errTest)
				case "close":
					require.NoError(t, b.Close())
					sentinel = dchannel.ErrBackendClosed
				}
				err := <-result
				if isWrite(name) {
					require.ErrorIs(t, err, dchannel.ErrUncertain, name)
					require.Equal(t, end == "context", errors.Is(err, context.Canceled))
					require.Equal(t, end == "cut", errors.Is(err, errTest))
					require.NotErrorIs(t, err, dchannel.ErrUnavailable)
					require.NotErrorIs(t, err, dchannel.ErrBackendClosed)
				} else {
					require.ErrorIs(t, err, sentinel, name)
					require.NotErrorIs(t, err, dchannel.ErrUncertain, name)
				}
				b.Store().Resume()
				if isWrite(name) {
					require.EqualValues(t, 1, b.Store().Calls(), "%s is done late", name)
				} else {
					require.Zero(t, b.Store().Calls(), name)
				}
				require.Zero(t, b.Store().Subscriptions("c"))
			})
		}
	}
}

// TestResumeAtTheEndOfAContext: a call that both end at once is done and says so, or
// is not done; a subscription must not be made for nobody.
func TestResumeAtTheEndOfAContext(t *testing.T) {
	t.Parallel()
	for range 100 {
		synctest.Test(t, func(t *testing.T) {
			b := memory.New()
			b.Store().Pause()
			ctx, cancel := context.WithCancel(context.Background())
			result := make(chan error, 1)
			go func() { result <- calls(b, "c")["Subscribe"](ctx) }()
			synctest.Wait()
			cancel()
			b.Store().Resume()
			require.Equal(t, <-result == nil, b.Store().Calls() == 1)
			require.Zero(t, b.Store().Subscriptions("c"))
		})
	}
}

// TestLateWriteAndItsRetry: the retry queues behind the write that was given up.
func TestLateWriteAndItsRetry(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := memory.New()
		r, _ := subscribe(t, b, "c")
		b.Store().Pause()
		f := frame("late")
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_, err := b.Publish(ctx, "c", f)
		require.ErrorIs(t, err, dchannel.ErrUncertain)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		_, ok, _ := b.PublishNow("c", f)
		require.False(t, ok)
		f.Age = time.Second
		retried := make(chan dchannel.Position)
		go func() {
			pos, err := b.Publish(context.Background(), "c", f)
			if err != nil {
				panic(err)
			}
			retried <- pos
		}()
		time.Sleep(time.Minute)
		require.Empty(t, r.told())
		b.Store().Resume()
		require.EqualValues(t, 1, (<-retried).Seq)
		require.Equal(t, []string{"entry 1-1"}, r.told())
		require.Len(t, readAll(t, b, "c").Entries, 1)
	})
}

func TestHealDuringPauseWaitsForResume(t *testing.T) {
	t.Parallel()
	b := memory.New()
	r, _ := subscribe(t, b, "c")
	b.Store().Pause()
	b.Cut(nil)
	b.Heal()
	require.Equal(t, []string{"interrupted"}, r.told())
	b.Store().Resume()
	require.Equal(t, []string{"live", "resync"}, r.told())
	b.Store().Pause()
	b.Cut(nil)
	b.Heal()
	b.Cut(nil)
	b.Store().Resume()
	require.Equal(t, []string{"interrupted"}, r.told(), "cut again meanwhile")
	b.Heal()
	require.Equal(t, []string{"live", "resync"}, r.told())
}

func TestLoseState(t *testing.T) {
	t.Parallel()
	b := memory.New()
	cut := b.Store().Backend()
	r, _ := subscribe(t, b, "c")
	away, _ := subscribe(t, cut, "c")
	f := frame("lost")
	before := publish(t, b, "c", f)
	head := readAll(t, b, "c").Head
	cut.Cut(nil)
	r.told()
	away.told()

	b.Store().LoseState()
	require.Equal(t, []string{"interrupted", "live", "resync"}, r.told())
	require.Empty(t, away.told(), "who is cut off learns nothing")
	require.Zero(t, b.Store().Channels())
	now := readAll(t, b, "c").Head
	require.Zero(t, now.Position)
	require.NotEqual(t, head.Incarnation, now.Incarnation)
	f.Age = time.Second
	_, err := b.Publish(context.Background(), "c", f)
	require.ErrorIs(t, err, dchannel.ErrUncertain)
	after := publish(t, b, "c", frame("new"))
	require.EqualValues(t, 1, after.Seq)
	require.Greater(t, after.Epoch, before.Epoch)
	require.Equal(t, []string{"entry 1-1"}, r.told(), "the subscription has survived")

	r.told()
	b.Store().Pause()
	b.Store().LoseState()
	require.Equal(t, []string{"interrupted"}, r.told())
	b.Store().Resume()
	require.Equal(t, []string{"live", "resync"}, r.told())
}

func TestLoseLast(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	for _, c := range []struct {
		lose     int
		wantSeq  uint64
		wantText []string
	}{
		{0, 6, []string{"c", "dd", "e", ""}},
		{1, 5, []string{"c", "dd", "e"}},
		{2, 4, []string{"c", "dd"}},
		{3, 2, []string{"c"}},
		{4, 1, []string{}},
		{9, 1, []string{}}, // the first one is trimmed, and so is not taken back
	} {
		b := memory.New(memory.WithRetention(4, time.Hour))
		r, _ := subscribe(t, b, "c")
		var last dchannel.Position
		for _, text := range []string{"b", "c", "dd", "e"} {
			f := frame(text)
			f.Count = len(text)
			last = publish(t, b, "c", f)
		}
		marker, err := b.MarkClosed(ctx, "c", dchannel.NewID(), time.Second)
		require.NoError(t, err)
		before := readAll(t, b, "c")
		require.Equal(t, dchannel.Position{Epoch: last.Epoch, Seq: 6}, marker)
		r.told()

		b.Store().LoseLast("c", c.lose)
		require.Equal(t, []string{"interrupted", "live", "resync"}, r.told())
		page := readAll(t, b, "c")
		require.Equal(t, c.wantText, texts(page.Entries))
		require.Equal(t, dchannel.Position{Epoch: last.Epoch, Seq: c.wantSeq}, page.Head.Position)
		require.NotEqual(t, before.Head.Incarnation, page.Head.Incarnation)
		if c.lose == 0 {
			require.True(t, page.Head.Closed)
			continue
		}
		require.Equal(t, before.Entries[len(c.wantText)].Prev, page.Head.ID)
		f := frame("other")
		require.Equal(t, c.wantSeq+1, publish(t, b, "c", f).Seq)
		written := r.got()[len(r.got())-1]
		require.Equal(t, page.Head.ID, written.Prev)
		require.Equal(t, f.ID, written.ID)
	}
	b := memory.New()
	publish(t, b, "c", frame("all"))
	b.Store().LoseLast("c", 1)
	b.Store().LoseLast("none", 1)
	require.Zero(t, b.Store().Channels())
}
