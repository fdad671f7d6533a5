package nats_test

import (
	"crypto/tls"
	"testing"

	natsgo "github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
	"github.com/stretchr/testify/require"

	"github.com/dchannel/dchannel"
	"github.com/dchannel/dchannel/backend/nats"
	"github.com/dchannel/dchannel/internal/testserver"
)

// works publishes and listens through a connection made with these options.
func works(t *testing.T, url string, opts ...natsgo.Option) {
	b := nats.New(connect(t, url, opts...))
	t.Cleanup(func() { require.NoError(t, b.Close()) })
	ch, err := dchannel.Open(within(t), "access", b)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, ch.Detach()) })
	require.NoError(t, ch.Publish(within(t), "in order"))
	v, err := ch.Listen(within(t))
	require.NoError(t, err)
	require.Equal(t, "in order", v)
}

func TestCredentials(t *testing.T) {
	t.Run("password", func(t *testing.T) {
		s := testserver.NATSForTest(t, testserver.NATSConfig{User: "app", Password: "open sesame"})
		works(t, s.URL(), natsgo.UserInfo("app", "open sesame"))
		_, err := natsgo.Connect(s.URL(), natsgo.UserInfo("app", "shut sesame"))
		require.ErrorIs(t, err, natsgo.ErrAuthorization)
		require.NotContains(t, err.Error(), "sesame")
	})
	t.Run("nkey", func(t *testing.T) {
		pair, err := nkeys.CreateUser()
		require.NoError(t, err)
		public, err := pair.PublicKey()
		require.NoError(t, err)
		s := testserver.NATSForTest(t, testserver.NATSConfig{
			User: "probe", Password: "probe",
			Config: `authorization { users: [{ nkey: "` + public + `" }, { user: probe, password: probe }] }`,
		})
		works(t, s.URL(), natsgo.Nkey(public, pair.Sign))
		other, err := nkeys.CreateUser()
		require.NoError(t, err)
		_, err = natsgo.Connect(s.URL(), natsgo.Nkey(public, other.Sign))
		require.ErrorIs(t, err, natsgo.ErrAuthorization)
	})
	t.Run("TLS", func(t *testing.T) {
		s := testserver.NATSForTest(t, testserver.NATSConfig{TLS: testserver.MutualTLS})
		works(t, s.URL(), natsgo.Secure(s.TLS()))
		_, err := natsgo.Connect(s.URL(), natsgo.Secure(&tls.Config{MinVersion: tls.VersionTLS12}))
		require.ErrorContains(t, err, "certificate")
	})
}
